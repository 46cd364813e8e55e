"""Tasks of models with a head, as a person runs them: train, resume, predict, merge, evaluate."""

import hashlib
import json
import signal
from pathlib import Path

import pytest

FILMS = [
    {"text": f"{word} film {i}", "label": label} for i in range(12) for word, label in (("good", "yes"), ("bad", "no"))
]
TAGGED = [{"tokens": ["the", word, "film", str(i)], "tags": ["O", tag, "O", "O"]} for i in range(8) for word, tag in
          (("good", "B-X"), ("bad", "B-Y"))]  # fmt: skip
ASKED = [
    {"question": "who?", "context": f"{name} saw film {i}.", "answers": {"text": [name], "answer_start": [0]}}
    for i in range(8)
    for name in ("anna", "bob")
]


@pytest.fixture
def headed(encoder, tmp_path):
    """`headed("sequence-classification", rows)`: a recipe that trains a tiny BERT on them in a second."""

    def write(task: str, rows: list[dict], **train: object) -> Path:
        path, data = tmp_path / f"{task}.yaml", tmp_path / "rows.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        settings = {"steps": 12, "batch_size": 8, "lr": 0.02, "warmup": 0, **train}
        path.write_text(
            f"task: {task}\nbase: {encoder()}\ndtype: float32\ndevice: cpu\noutput: {tmp_path / 'runs'}\nname: small\n"
            "adapter: {r: 4, target_modules: all-linear, lora_dropout: 0.1}\n"
            f"data: {{path: {data}, eval_path: {data}}}\ntrain: {json.dumps(settings)}\n"
            "eval: {every_steps: 4}\ncheckpoint: {every_steps: 2}\n"
        )
        return path

    return write


def test_a_classifier_from_rows_to_predictions(veneer, headed, tmp_path):
    said = veneer("train", headed("sequence-classification", FILMS))
    assert said.code == 0, said.err
    assert "classifier start at random" in said.err
    run = tmp_path / "runs/small-1"
    assert f"predict {run} --text 'good film 0'" in said.out
    figures = json.loads((run / "run.json").read_text())["figures"]
    assert figures["accuracy"] == 1
    card = (run / "adapter/README.md").read_text()
    for words in ("pipeline_tag: text-classification", 'veneer predict ADAPTER --text "…"', "| label | predicted |"):
        assert words in card
    texts = ["bad film 77", "good film 3"]
    said = veneer("predict", run, "--dtype", "float32", *(part for text in texts for part in ("--text", text)))
    rows = list(map(json.loads, said.out.splitlines()))
    assert [row["label"] for row in rows] == ["no", "yes"]
    assert all(row["probability"] > 0.5 for row in rows)
    (tmp_path / "texts.csv").write_text("text\nbad film 77\ngood film 3\n")
    veneer("predict", run, "--dtype", "float32", "--input", tmp_path / "texts.csv", "--out", tmp_path / "said.jsonl")
    assert [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()] == rows
    said = veneer("evaluate", run, "--json")
    assert json.loads(said.out)["adapted"]["accuracy"] == 1
    assert veneer("merge", run, "--out", tmp_path / "merged").code == 0
    from transformers import pipeline

    alone = pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu")(texts)
    for row, own in zip(rows, alone, strict=True):
        assert (own["label"], own["score"]) == (row["label"], pytest.approx(row["probability"], abs=1e-5))


@pytest.mark.parametrize(
    ("task", "rows", "asked", "expected"),
    [
        ("token-classification", TAGGED, ["--text", "the bad film 9"], {"tags": ["O", "B-Y", "O", "O"]}),
        ("question-answering", ASKED, ["--text", "anna saw film 9.", "--question", "who?"], {"answer": "anna"}),
    ],
)
def test_tags_and_answers(veneer, headed, tmp_path, task, rows, asked, expected):
    said = veneer("train", headed(task, rows, steps=24))
    assert said.code == 0, said.err
    run = tmp_path / "runs/small-1"
    assert json.loads((run / "run.json").read_text())["figures"]["f1"] > 0.8
    (row,) = map(json.loads, veneer("predict", run, *asked).out.splitlines())
    assert row | expected == row
    said = veneer("generate", run, "--prompt", "x")
    assert said.code == 2
    assert "veneer predict" in said.err


def test_faults_of_predict_are_one_error(veneer, headed, tmp_path):
    veneer("train", headed("sequence-classification", FILMS, steps=1))
    run = tmp_path / "runs/small-1"
    for arguments, message in (
        ((), "--text TEXT"),
        (("--text", "a", "--pair", "b"), "trained on one text"),
        (("--input", tmp_path / "absent.jsonl"), "there is no such file"),
    ):
        said = veneer("predict", run, *arguments)
        assert (said.code, message in said.err) == (2, True), said.err


def test_a_dry_run_shows_texts_and_labels(veneer, headed):
    said = veneer("train", headed("sequence-classification", FILMS), "--dry-run")
    assert said.code == 0, said.err
    assert "good film 0 → yes" in said.out
    assert "Labels: no (12), yes (12)." in said.out


def test_a_run_that_was_cut_short_ends_with_the_bits_of_an_undisturbed_one(veneer, headed, tmp_path, monkeypatch):
    from veneer.train.language.sequence_classification import SequenceClassification

    recipe = headed("sequence-classification", FILMS)
    veneer("train", recipe, f"output={tmp_path / 'whole'}")
    loss, calls = SequenceClassification.loss, []

    def cutting(self, batch):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SequenceClassification, "loss", cutting)
        assert veneer("train", recipe).code == 128 + signal.SIGTERM
    assert veneer("train", recipe, "--resume").code == 0
    bits = [(tmp_path / f"{name}/small-1/adapter/adapter_model.safetensors").read_bytes() for name in ("whole", "runs")]
    assert len({hashlib.sha256(own).hexdigest() for own in bits}) == 1
