"""text-to-text: what encoder and decoder are given, and the loss of transformers' own models."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from veneer.core.errors import AdapterError
from veneer.train.language.pairs import encode_pairs, encode_source, frame_of, sides
from veneer.train.language.settings import PairData
from veneer.train.language.shapes import Document
from veneer.train.language.text_to_text import TextToText
from veneer.train.language.tokens import unpacked
from veneer.train.settings import checked
from veneer.train.task import Reporter

ROWS = [("Name an inn:", "The Golden Inn."), ("What is 12 + 30? Say it, please.", "42"), ("The cat sat", "on the mat.")]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in ROWS))
    return path


def task_of(base, rows, **keys) -> TextToText:
    values = {
        "task": "text-to-text",
        "base": str(base),
        "dtype": "float32",
        "device": "cpu",
        "data": {"path": str(rows), "eval_path": str(rows)},
        "adapter": {"r": 2, "target_modules": "all-linear", "init_lora_weights": False},
        **keys,
    }
    return TextToText(checked(TextToText.settings, values, "test"), Reporter())


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_law_the_loss_and_its_gradient_are_those_of_the_models_own_logits(base_of, rows, family, smoothing):
    """Rows one by one, tokenised by the tokenizer itself, through the model as transformers feeds it."""
    base = base_of(family, **{"dropout_rate" if family == "t5" else "dropout": 0.0})
    task = task_of(base, rows, train={"label_smoothing": smoothing})
    model = task.model.double().train()
    tokenizer = AutoTokenizer.from_pretrained(base)
    batches = task.batches(range(3))
    found = sum(task.loss(batch) for batch in batches)
    wanted, plain, units = torch.zeros((), dtype=torch.float64), 0.0, 0
    for prompt, completion in ROWS:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        labels = tokenizer(text_target=completion, return_tensors="pt").input_ids
        said = model(**ids, labels=labels)
        more = {"reduction": "sum", "label_smoothing": smoothing}
        wanted = wanted + F.cross_entropy(said.logits[0], labels[0], **more)
        plain, units = plain + said.loss.item() * labels.numel(), units + labels.numel()
    assert sum(batch.units for batch in batches) == units
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    trained = [own for own in model.parameters() if own.requires_grad]
    pairs = zip(torch.autograd.grad(found, trained), torch.autograd.grad(wanted, trained), strict=True)
    for got, own in pairs:
        torch.testing.assert_close(got, own, rtol=1e-7, atol=1e-10)
    assert task.evaluate(whole=False)["eval_loss"] == pytest.approx(plain / units)


def test_only_learned_tokens_reach_the_head(base_of, rows):
    for family in ("t5", "bart"):
        task = task_of(base_of(family), rows)
        assert task.head is not None
        (batch,) = task.batches(range(3))
        assert batch.inputs["keep"].sum() == len(batch.inputs["targets"]) < batch.inputs["keep"].numel()


@pytest.mark.parametrize(("family", "source"), [("t5", ([], [2])), ("bart", ([1], [2]))])
def test_rows_stand_in_the_tokenizers_frame(base_of, family, source):
    tokenizer = AutoTokenizer.from_pretrained(base_of(family))
    assert frame_of(tokenizer, "text") == frame_of(tokenizer, "text_target") == source
    data = PairData(path="-", max_length=6, max_completion=4)
    long, short = "The cat sat on the mat. " * 3, "a"
    made = [Document("t, line 1", p, c) for p, c in ((short, short), (long, short), (short, long), (short, " "))]
    found = list(encode_pairs(made, tokenizer, data))
    assert [own.fate.name for own in found] == ["KEPT", "CUT", "CUT", "LEFT_OUT"]
    for document, own in zip(made[:3], found, strict=False):
        prompt, completion = sides(unpacked(own.packed(), 0))
        assert own.units == len(completion) <= 4
        assert prompt == encode_source(document.prompt, tokenizer, data)
        assert (prompt[: len(source[0])], prompt[-1]) == (source[0], 2)  # also where it was cut
        assert len(prompt) <= 6
        whole = tokenizer(text_target=document.completion).input_ids
        assert completion == whole[: len(completion)]
    dropped = list(encode_pairs(made[1:2], tokenizer, data.model_copy(update={"too_long": "drop"})))
    assert dropped[0].fate.name == "DROPPED"


def test_a_base_of_another_kind_is_refused(base_of, rows):
    with pytest.raises(AdapterError, match="a llama is a decoder; say task=causal-lm"):
        task_of(base_of("llama"), rows)


def test_beams_answer_as_the_model_does_alone(base_of, rows):
    from veneer.train.language.answers import answer

    task = task_of(base_of("bart"), rows)
    prompts = [encode_source(prompt, task.tokenizer, task.recipe.data) for prompt, _ in ROWS]
    for beams in (1, 3):
        found = answer(task.model, task.tokenizer, prompts, 5, num_beams=beams)
        for ids, text in zip(prompts, found, strict=True):
            options = {"num_beams": beams, "max_new_tokens": 5, "do_sample": False}
            one = task.model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
            assert task.tokenizer.decode(one[0], skip_special_tokens=True).strip() == text
