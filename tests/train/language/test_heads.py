"""Tasks of models with a head: genuine tiny models, their own loss, their labels, their windows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veneer.core.errors import AdapterError
from veneer.train.run import read_recipe
from veneer.train.task import Reporter, Task

TEXTS = [("good film", "yes"), ("bad film", "no"), ("a good good film, it is", "yes"), ("bad bad film?", "no")] * 3
WORDS = [
    (["anna", "met", "bob"], ["B-PER", "O", "B-PER"]),
    (["the", "new", "york", "film"], ["O", "B-LOC", "I-LOC", "O"]),
]
CONTEXT = "anna saw a good film in york. " + "it was 2 hours long and not bad. " * 4 + "bob saw a bad film in leeds."
QUESTIONS = [
    {"question": "who saw a good film?", "context": CONTEXT, "answers": {"text": ["anna"], "answer_start": [0]}},
    {"question": "where was the bad film?", "context": CONTEXT, "answers": ["leeds"]},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def made(tmp_path):
    """`made("sequence-classification", base, rows, **settings)`: the task, and what it said."""

    def build(task: str, base: Path, rows: list[dict[str, Any]], **settings: object) -> tuple[Task, list[str]]:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        values = {
            "base": base,
            "dtype": "float32",
            "device": "cpu",
            "adapter.target_modules": "all-linear",
            "data.path": tmp_path / "rows.jsonl",
            "data.eval_path": tmp_path / "rows.jsonl",
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        recipe, kind = read_recipe(task, [f"{key}={json.dumps(v, default=str)}" for key, v in values.items()])
        reporter = Reporter()
        said: list[str] = []
        reporter.say = said.append  # type: ignore[method-assign]
        return kind(recipe, reporter), said

    return build


def texts(*names: str) -> list[dict[str, Any]]:
    text, label = names or ("text", "label")
    return [dict(zip((text, label), row, strict=True)) for row in TEXTS]


def own_loss(task: Any, rows: list[int]) -> float:
    """Transformers' own loss on the rows."""
    (batch,) = task.batches(rows)
    inputs = dict(batch.inputs)
    labels = inputs.pop("labels")
    if task.task_type == "QUESTION_ANS":
        return task.model(**inputs, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss.item()
    return task.model(**inputs, labels=labels).loss.item()


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "llama"])
def test_the_loss_is_transformers_own(encoder, made, family):
    """And the loss of all rows is the sum of the loss of each."""
    task, _ = made("sequence-classification", encoder(family), texts())
    task.model.double().eval()
    rows = list(range(4))
    (batch,) = task.batches(rows)
    assert batch.units == 4
    with torch.no_grad():
        whole = task.loss(batch).item()
        assert whole / 4 == pytest.approx(own_loss(task, rows), rel=1e-9)
        assert whole == pytest.approx(sum(task.loss(task.batches([row])[0]).item() for row in rows), rel=1e-9)


def test_numbers_and_pairs(encoder, made):
    rows = [{"sentence1": "good", "sentence2": text, "score": i / 4} for i, (text, _) in enumerate(TEXTS)]
    task, _ = made("sequence-classification", encoder(), rows)
    assert (task.data.problem, task.data.text, task.data.pair, task.data.label) == (
        *("numbers", "sentence1", "sentence2"),
        "score",
    )
    task.model.eval()
    (batch,) = task.batches([0, 1, 2, 3])
    assert set(batch.inputs["token_type_ids"].unique().tolist()) == {0, 1}
    with torch.no_grad():
        assert task.loss(batch).item() / 4 == pytest.approx(own_loss(task, [0, 1, 2, 3]), rel=1e-6)
    figures = task.evaluate(whole=True)
    said = [own["label"] for own in task.said_of(list(task.held_out.documents))]
    true = [row["score"] for row in rows]
    assert figures["pearson"] == pytest.approx(np.corrcoef(said, true)[0, 1], rel=1e-4)
    assert figures["eval_loss"] == pytest.approx(np.mean((np.array(said) - true) ** 2), rel=1e-4)
    assert (task.judged_by, task.higher_is_better) == ("pearson", True)


def test_passes_of_like_length_have_the_gradient_of_one(encoder, made):
    task, _ = made("sequence-classification", encoder(), texts(), train__pass_tokens=24)
    rows = list(range(8))
    batches = task.batches(rows)
    assert len(batches) > 2
    assert sum(batch.units for batch in batches) == 8
    assert all(batch.inputs["input_ids"].numel() <= 24 or len(batch.places) == 1 for batch in batches)
    task.model.eval()
    task.most = 10**6
    grads = []
    for passes in (batches, task.batches(rows)):
        task.model.zero_grad()
        for batch in passes:
            task.loss(batch).backward()
        grads.append([p.grad.clone() for p in task.model.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads)


def test_figures_are_those_of_what_is_said(encoder, made):
    task, _ = made("sequence-classification", encoder(), texts(), sample__count=2)
    said = task.said_of(list(task.held_out.documents))
    right = np.mean([own["label"] == label for own, (_, label) in zip(said, TEXTS, strict=True)])
    assert task.evaluate(whole=True)["accuracy"] == pytest.approx(right)
    assert all(0.5 <= own["probability"] <= 1 for own in said)
    (sample, _) = task.sample()
    assert sample == {
        "text": "good film",
        "label": "yes",
        "predicted": f"{said[0]['label']} ({said[0]['probability']:.2f})",
    }


@pytest.mark.parametrize(
    ("family", "heads"),
    [
        ("bert", ["classifier"]),
        ("roberta", ["classifier"]),
        ("deberta-v2", ["classifier", "pooler"]),
        ("distilbert", ["classifier", "pre_classifier"]),
        ("llama", ["score"]),
    ],
)
def test_what_starts_at_random_is_trained_and_saved(encoder, made, tmp_path, family, heads):
    base = encoder(family)
    task, said = made("sequence-classification", base, texts())
    assert task.model.peft_config["default"].modules_to_save == heads
    assert any(line.startswith(", ".join(heads)) for line in said)
    assert task.model.config.id2label == {0: "no", 1: "yes"}
    for parameter in task.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    task.model.save_pretrained(tmp_path / "adapter")
    before = task.evaluate(whole=True)
    again, _ = made("sequence-classification", base, texts(), train__seed=7)  # another random head below
    again.model.hotswap_adapter(tmp_path / "adapter")
    assert again.evaluate(whole=True) == before


def test_a_pooler_that_the_base_lacks_is_part_of_the_head(encoder, made):
    task, _ = made("sequence-classification", encoder("bert", "MaskedLM"), texts())
    assert task.model.peft_config["default"].modules_to_save == ["bert.pooler", "classifier"]


def test_a_head_for_other_labels_is_begun_anew_and_a_fitting_one_is_kept(encoder, made):
    three = encoder("bert", "SequenceClassification", num_labels=3)
    task, said = made("sequence-classification", three, texts())
    assert task.model.classifier.out_features == 2
    assert "classifier start at random" in " ".join(said)
    names = {0: "Yes", 1: "No"}
    two = encoder("bert", "SequenceClassification", id2label=names, label2id={"Yes": 0, "No": 1})
    task, said = made("sequence-classification", two, texts())
    assert task.data.labels == ["yes", "no"]
    assert "random" not in " ".join(said)


def test_a_wrong_base_is_one_error(encoder, made, tmp_path):
    folder = encoder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(AdapterError, match=r"not a whole bert: .*bert\.encoder\.layer\.2.* missing"):
        made("sequence-classification", folder, texts())
    with pytest.raises(AdapterError, match="cannot be loaded as AutoModelForTokenClassification"):
        made("token-classification", _vision(tmp_path), _tagged())


def _vision(folder: Path) -> Path:
    """A model that reads no words, with a tokenizer all the same."""
    (folder / "vit").mkdir()
    (folder / "vit/config.json").write_text('{"model_type": "vit"}')
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained(folder / "vit")
    return folder / "vit"


def _tagged() -> list[dict[str, Any]]:
    return [{"tokens": words, "ner_tags": tags} for words, tags in WORDS * 3]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"text": "a", "label": "x"}] * 3, {}, "all rows have the label 'x'"),
        (
            [{"text": "a", "label": None}, {"text": "b"}],
            {},
            r"2 of 2 rows (.|\n)*'label' is None, expected a name or a number",
        ),
        (
            [{"body": "a", "label": 1}],
            {},
            r"expected the column text or sentence.*found 'body', 'label'; say data\.text=",
        ),
        (texts(), {"data__label": "lable"}, "expected the column label='lable'; did you mean 'label'"),
        (texts(), {"data__labels": ["ja", "no"]}, "not known: 'yes'.*expected 'ja', 'no'"),
        (texts(), {"data__problem": "numbers"}, r"12 of 12 rows (.|\n)*expected a number"),
        (texts(), {"eval__judge": "pearson"}, "eval.judge=pearson: expected loss, accuracy, f1, matthews"),
        ([{"text": f"{i}", "label": f"n{i}"} for i in range(30)], {}, "30 different labels in 30 rows are no classes"),
    ],
)
def test_faults_of_rows_and_settings_are_named(encoder, made, rows, settings, message):
    with pytest.raises(AdapterError, match=message):
        made("sequence-classification", encoder(), rows, **settings)


@pytest.mark.parametrize(
    ("labels", "settings", "names"),
    [
        ([0, 1, 1, 0], {}, ["0", "1"]),
        (["0", 1, 1.0, 0], {}, ["0", "1"]),
        ([10, 9, 2, 2], {}, ["2", "9", "10"]),
        ([False, True, True, False], {}, ["false", "true"]),
        ([0, 1, 1, 0], {"data__labels": ["neg", "pos", "none"]}, ["neg", "pos", "none"]),
    ],
)
def test_labels_are_names_or_numbers(encoder, made, labels, settings, names):
    rows = [{"text": f"film {i}", "label": label} for i, label in enumerate(labels)]
    task, _ = made("sequence-classification", encoder(), rows, **settings)
    assert task.data.labels == names
    assert task.usage()["data"]["labels"] == names


def test_rows_are_tokenised_once(encoder, made):
    base = encoder()
    made("sequence-classification", base, texts())
    task, _ = made("sequence-classification", base, texts(), train__seed=5)
    again = task.made_of()
    task, _ = made("sequence-classification", base, texts(), data__max_length=8)
    assert task.made_of() != again
    assert any("cut: " in line for line in task.part.report.sentences())
    task, said = made("sequence-classification", encoder("roberta"), texts(), data__max_length=500)
    assert task.data.max_length == 65  # of 66 positions RoBERTa's begin behind that of its padding, which is 0 here
    assert "data.max_length is 65, the most tokens that the base reads" in said


def test_words_get_tags_at_their_first_token(encoder, made):
    task, _ = made("token-classification", encoder(), _tagged())
    assert task.data.labels == ["B-LOC", "B-PER", "I-LOC", "O"]
    tokens = task.part.examples[0]
    pieces = task.tokenizer.convert_ids_to_tokens(tokens["input_ids"].tolist())
    begins = [piece for piece, tag in zip(pieces, tokens["tag"], strict=True) if tag != -100]
    assert begins == ["a", "m", "b"]
    assert [task.data.labels[tag] for tag in tokens["tag"] if tag >= 0] == WORDS[0][1]
    task.model.double().eval()
    (batch,) = task.batches([0, 1, 2])
    assert batch.units == 3 + 4 + 3
    with torch.no_grad():
        assert task.loss(batch).item() / 10 == pytest.approx(own_loss(task, [0, 1, 2]), rel=1e-9)
    task.model.float()
    figures, said = task.evaluate(whole=True), task.said_of(list(task.held_out.documents))
    right = [
        a == b for own, (_, tags) in zip(said, WORDS * 3, strict=True) for a, b in zip(own["tags"], tags, strict=True)
    ]
    assert figures["accuracy"] == pytest.approx(np.mean(right))
    assert (task.judged_by, list(figures)) == ("f1", ["eval_loss", "precision", "recall", "f1", "accuracy"])


def test_words_that_are_cut_off_have_no_tag_and_count(encoder, made):
    task, _ = made("token-classification", encoder(), _tagged(), data__max_length=6)
    (said,) = task.said_of([task.typed("anna bobb york", None)])
    assert len(said["tags"]) == 3
    assert said["probabilities"][1:] == [0.0, 0.0]
    assert said["tags"][1:] == ["O", "O"]


def test_windows_of_a_context_hold_its_answer(encoder, made):
    task, _ = made("question-answering", encoder(), QUESTIONS, data__max_length=60, data__stride=16)
    part = task.part
    assert len(part.examples) > 4
    assert task.data.unanswered is False
    held = {0: [], 1: []}
    for i, tokens in enumerate(part.examples):
        first, last = part.examples.table[["first", "last"]][i].item()
        if first:
            text = CONTEXT[tokens["begin"][first] : tokens["end"][last]]
            held[int(part.examples.of[i])].append(text)
        starts = tokens["begin"][tokens["begin"] >= 0]
        assert len(tokens) <= 60
        assert (np.diff(starts) > 0).all()
    assert held == {0: ["anna"], 1: ["leeds"]}
    task.model.double().eval()
    rows = list(range(len(part.examples)))
    task.most = 10**6
    with torch.no_grad():
        (batch,) = task.batches(rows)
        assert task.loss(batch).item() / len(rows) == pytest.approx(own_loss(task, rows), rel=1e-9)


def test_the_best_span_of_all_windows_is_the_answer(encoder, made):
    task, _ = made("question-answering", encoder(), QUESTIONS, data__max_length=60, data__stride=16)
    wanted = CONTEXT.index("leeds")

    def outputs(batch: Any) -> torch.Tensor:
        logits = torch.zeros(len(batch.places), 2, batch.inputs["input_ids"].shape[1])
        for i, ids in enumerate(batch.inputs["input_ids"].tolist()):
            pieces = task.tokenizer.convert_ids_to_tokens(ids)
            for j in range(len(pieces) - 4):
                if pieces[j : j + 5] == ["l", "##e", "##e", "##d", "##s"]:
                    logits[i, 0, j] = logits[i, 1, j + 4] = 9.0
        return logits

    task.outputs = outputs
    said = task.said_of(list(task.held_out.documents))
    assert [own["answer"] for own in said] == ["leeds", "leeds"]
    assert said[0]["start"] == wanted
    assert said[0]["probability"] > 0.9
    assert task.evaluate(whole=True)["exact_match"] == 0.5
    task.data.longest_answer = 4
    assert task.said_of(list(task.held_out.documents))[0]["answer"] != "leeds"


def test_a_question_without_an_answer(encoder, made):
    rows = [*QUESTIONS, {"question": "who?", "context": "nobody.", "answers": {"text": [], "answer_start": []}}]
    task, _ = made("question-answering", encoder(), rows, data__max_length=60, data__stride=16)
    assert task.data.unanswered is True
    task.outputs = lambda batch: torch.nn.functional.one_hot(
        torch.zeros(len(batch.places), 2, dtype=torch.long), batch.inputs["input_ids"].shape[1]
    ).float()
    assert [own["answer"] for own in task.said_of(list(task.held_out.documents))] == ["", "", ""]
    assert task.evaluate(whole=True)["exact_match"] == pytest.approx(1 / 3)
    rows[0]["answers"] = {"text": ["bob"], "answer_start": [3]}
    with pytest.raises(AdapterError, match=r"line 1: the answer 'bob' is not in the context at character 3"):
        made("question-answering", encoder(), rows)
