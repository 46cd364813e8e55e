"""preference: the loss is DPO's formula over dense logits, and so is its gradient."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from veneer.core.errors import AdapterError
from veneer.train.data.rows import Row, read_rows
from veneer.train.language.comparisons import Comparison, comparison, encode_comparisons, halves, settle_shape
from veneer.train.language.preference import Preference
from veneer.train.language.settings import PreferenceData
from veneer.train.language.tokens import unpacked
from veneer.train.settings import checked
from veneer.train.task import Reporter

ROWS = [
    ("Name an inn:", " The Golden Inn.", " 42"),
    ("What is 12 + 30?", " It is 42, said she.", " It is 30."),
    ("The cat sat", " on the mat.", " on the inn. The cat is a pub, said she."),
]
CHAT = "{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '</s>' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    names = ("prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in ROWS))
    return path


def task_of(base, rows, fresh=False, train=None, **keys) -> Preference:
    values = {
        "task": "preference",
        "base": str(base),
        "dtype": "float32",
        "device": "cpu",
        "data": {"path": str(rows), "eval_path": str(rows)},
        "adapter": {"r": 2, "target_modules": "all-linear", "init_lora_weights": fresh},
        "train": {"beta": 0.3, **(train or {})},
        **keys,
    }
    return Preference(checked(Preference.settings, values, "test"), Reporter())


def log_p(model, tokenizer, prompt: str, completion: str) -> torch.Tensor:
    """log p(completion | prompt) from dense logits, of the ids that are said in one row."""
    head = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = head + tokenizer(completion, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    logits = model(torch.tensor([ids])).logits[0]
    of_each = F.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None])
    return of_each[len(head) - 1 :].sum()


def dense_margins(task) -> torch.Tensor:
    """β ((log π(c) - log π(r)) - (log π₀(c) - log π₀(r))) of each row."""
    margins = []
    for prompt, chosen, rejected in ROWS:
        now = [log_p(task.model, task.tokenizer, prompt, text) for text in (chosen, rejected)]
        with task.model.disable_adapter(), torch.no_grad():
            then = [log_p(task.model, task.tokenizer, prompt, text) for text in (chosen, rejected)]
        margins.append(task.recipe.train.beta * ((now[0] - now[1]) - (then[0] - then[1])))
    return torch.stack(margins)


LOSSES = {
    "dpo": ({}, lambda m: -F.logsigmoid(m)),
    "cdpo": ({"label_smoothing": 0.2}, lambda m: -0.8 * F.logsigmoid(m) - 0.2 * F.logsigmoid(-m)),
    "ipo": ({"loss": "ipo"}, lambda m: (m / 0.3 - 1 / 0.6) ** 2),
}


@pytest.mark.parametrize(("family", "packing"), [("llama", True), ("llama", False), ("gpt2", True)])
@pytest.mark.parametrize("kind", LOSSES)
def test_law_the_loss_and_its_gradient_are_those_of_dense_logits(base_of, rows, family, packing, kind):
    train, formula = LOSSES[kind]
    task = task_of(base_of(family), rows, train={**train, "packing": packing, "pass_tokens": 60})
    assert (task.first_place is None) == (not packing)
    model = task.model.double().train()
    batches = task.batches(range(3))
    assert len(batches) > 1
    assert sum(batch.units for batch in batches) == 3
    found = sum(task.loss(batch) for batch in batches)
    wanted = formula(dense_margins(task)).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    trained = [own for own in model.parameters() if own.requires_grad]
    pairs = zip(torch.autograd.grad(found, trained), torch.autograd.grad(wanted, trained), strict=True)
    for got, own in pairs:
        torch.testing.assert_close(got, own, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_at_the_start_all_margins_are_nothing(base_of, rows, family):
    """To the bit, and where the base itself would drop a tenth of its states (GPT-2)."""
    task = task_of(base_of(family), rows, fresh=True)
    task.model.train()
    for batch in task.batches(range(3)):
        assert torch.equal(task.margins(batch), torch.zeros(len(ROWS)))
        assert task.loss(batch).item() == pytest.approx(len(ROWS) * math.log(2), rel=1e-6)
    figures = task.evaluate(whole=True)
    assert figures == {"eval_loss": pytest.approx(math.log(2)), "accuracy": 0.5, "margin": 0.0}


def test_the_figures_are_those_of_the_margins(base_of, rows):
    task = task_of(base_of("llama"), rows)
    task.model.eval()
    margins = dense_margins(task)
    figures = task.evaluate(whole=True)
    assert figures["eval_loss"] == pytest.approx(-F.logsigmoid(margins).mean().item(), rel=1e-4)
    assert figures["margin"] == pytest.approx(margins.mean().item(), rel=1e-3)
    assert figures["accuracy"] == pytest.approx((margins > 0).double().mean().item())


def test_gradient_checkpointing_changes_no_gradient(base_of, rows):
    grads = []
    for again in (False, True):
        task = task_of(base_of("llama"), rows)
        if again:
            from veneer.train.recompute import recompute_layers

            recompute_layers(task.model)
        task.model.train()
        for batch in task.batches(range(3)):
            task.loss(batch).backward()
        grads.append([own.grad for own in task.model.parameters() if own.requires_grad])
    for kept, again in zip(*grads, strict=True):
        assert torch.equal(kept, again)


USER, BETTER, WORSE = ({"role": r, "content": c} for r, c in (("user", "a?"), ("assistant", "b"), ("assistant", "c")))
MORE = {"role": "user", "content": "d?"}


@pytest.mark.parametrize(
    ("values", "given"),
    [
        ({"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]}, 1),
        ({"prompt": "a?", "chosen": [BETTER], "rejected": [WORSE]}, 1),
        ({"prompt": "a?", "chosen": [USER, BETTER], "rejected": [USER, WORSE]}, 1),
        ({"chosen": [USER, BETTER], "rejected": [USER, WORSE]}, 1),
        ({"prompt": [USER, BETTER, MORE], "chosen": [BETTER], "rejected": [WORSE]}, 3),
        ({"chosen": [USER, BETTER, MORE, BETTER], "rejected": [USER, BETTER, MORE, WORSE]}, 3),
    ],
)
def test_chats_are_compared_behind_their_prompt(base_of, values, given):
    tokenizer = AutoTokenizer.from_pretrained(base_of("llama", CHAT))
    data = PreferenceData(path="-", shape="messages")
    made = comparison(Row(values, "t, line 1"), data)
    assert made.chosen.given == made.rejected.given == given
    assert Comparison.unpacked(made.packed(), "t, line 1") == made
    (encoded,) = encode_comparisons([made], tokenizer, data)
    learned = []
    for half in halves(unpacked(encoded.packed(), 0)):
        runs = [i for i, flag in enumerate(half.learned) if flag]
        assert tokenizer.decode(half.ids[: runs[0]]).endswith("<s>assistant: ")
        learned.append(tokenizer.decode(half.ids[runs[0] : runs[-1] + 1]))
    assert learned == ["b</s>", "c</s>"]
    assert encoded.units == 4


def test_texts_are_put_into_templates(base_of):
    tokenizer = AutoTokenizer.from_pretrained(base_of("llama", CHAT))
    row = Row({"q": "a?", "good": "b", "bad": "c"}, "t, line 1")
    templates = {"prompt": "{q}", "chosen": "{good}", "rejected": "{bad}"}
    plain = comparison(row, PreferenceData(path="-", shape="prompt-completion", **templates))
    assert (plain.opening, plain.answer, plain.rejected.completion) == ("a?", "b", "c")
    data = PreferenceData(path="-", shape="prompt-completion", chat=True, **templates)
    chat = comparison(row, data)
    assert list(chat.opening) == [{"role": "user", "content": "a?"}]
    (encoded,) = encode_comparisons([chat], tokenizer, data)
    text = tokenizer.decode(encoded.ids)
    assert text == "<s>user: a?</s><s>assistant: b</s><s>user: a?</s><s>assistant: c</s>"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chosen": [USER, BETTER], "rejected": [MORE, WORSE]}, "expected a prompt"),
        ({"prompt": [USER], "chosen": [MORE], "rejected": [WORSE]}, "behind it in 'chosen'"),
        ({"prompt": [USER], "chosen": [BETTER]}, "'rejected' is null"),
    ],
)
def test_faulty_chats_are_named(values, message):
    with pytest.raises(AdapterError, match=f"t, line 1.*{message}"):
        comparison(Row(values, "t, line 1"), PreferenceData(path="-", shape="messages"))


def test_rows_without_the_columns_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "better": "b"}\n')
    with pytest.raises(AdapterError, match="expected the columns prompt, chosen and rejected"):
        settle_shape(read_rows(str(path)), PreferenceData(path="-"))


def test_a_pair_whose_prompt_was_cut_in_two_ways_is_no_comparison(base_of):
    tokenizer = AutoTokenizer.from_pretrained(base_of("llama"))
    data = PreferenceData(path="-", shape="prompt-completion", max_length=20)
    texts = {"prompt": "The cat sat on the mat. " * 6, "chosen": "a", "rejected": "a pub, said she. 12 + 30"}
    (encoded,) = encode_comparisons([comparison(Row(texts, "t, line 1"), data)], tokenizer, data)
    assert encoded.fate.name == "DROPPED"
    texts["prompt"] = "The cat"
    (encoded,) = encode_comparisons(
        [comparison(Row(texts, "t, line 1"), data.model_copy(update={"max_length": 8}))],
        tokenizer,
        data.model_copy(update={"max_length": 8}),
    )
    assert encoded.fate.name == "CUT"
