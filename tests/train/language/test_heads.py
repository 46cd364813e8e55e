"""Tasks of models with a head: genuine tiny models, their own loss, their labels, their windows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veneer.core.errors import AdapterError

TEXTS = [("good film", "yes"), ("bad film", "no"), ("a good good film, it is", "yes"), ("bad bad film?", "no")] * 3


def texts(*names: str) -> list[dict[str, Any]]:
    text, label = names or ("text", "label")
    return [dict(zip((text, label), row, strict=True)) for row in TEXTS]


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "llama"])
def test_the_loss_is_transformers_own(encoder, made, own_loss, family):
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


def test_numbers_and_pairs(encoder, made, own_loss):
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


def test_peft_reads_it(encoder, made, tmp_path):
    import peft
    from transformers import AutoModelForSequenceClassification

    base = encoder("bert", "MaskedLM")
    task, _ = made("sequence-classification", base, texts())
    for parameter in task.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    task.model.save_pretrained(tmp_path / "adapter")
    theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    task.model.eval()
    (batch,) = task.batches([0, 1, 2])
    with torch.no_grad():
        torch.testing.assert_close(theirs(**task.given(batch)).logits, task.outputs(batch))


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
        made("token-classification", _vision(tmp_path), [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}])


def _vision(folder: Path) -> Path:
    """A model that reads no words, with a tokenizer all the same."""
    (folder / "vit").mkdir()
    (folder / "vit/config.json").write_text('{"model_type": "vit"}')
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained(folder / "vit")
    return folder / "vit"


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
