"""Runs listed, shown and compared; an adapter measured again; a sweep; samples between steps."""

import json
import shutil
import sys
from pathlib import Path

import pytest


@pytest.fixture
def runs(veneer, recipe, tmp_path) -> Path:
    """Two runs, whose rates differ."""
    said = veneer("train", recipe, "--sweep", "train.lr=1.0e-2,1.0e-3", "sample.every_steps=2", "eval.answers=0")
    assert said.code == 0
    lines = said.out.splitlines()
    assert "train.lr" in next(line for line in lines if "held-out loss" in line)
    assert lines[-1].startswith("best: ")
    return tmp_path / "runs"


def held_out(run: Path) -> float:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["eval_loss"] for record in records if "eval_loss" in record][-1]


def test_runs_are_listed_shown_and_compared(veneer, runs, tmp_path):
    listed = json.loads(veneer("runs", "--in", runs, "--json").out)
    assert [(run["name"], run["state"], run["steps"], run["planned"]) for run in listed] == [
        ("small-1", "finished", 4, 4),
        ("small-2", "finished", 4, 4),
    ]
    best = min(held_out(runs / run["name"]) for run in listed)
    assert min(run["figures"]["eval_loss"] for run in listed) == best
    assert "small-2" in veneer("runs", "--in", runs).out
    shown = veneer("runs", "show", runs / "small-1").out
    for words in ("finished", "4 of 4", "step-00000004", "threads"):
        assert words in shown
    assert veneer("runs", "--in", runs, "show", "small-1").out == shown, "a name that `runs` lists is enough"
    picture = tmp_path / "both.png"
    said = veneer("runs", "compare", runs / "small-1", runs / "small-2", "--out", picture)
    assert said.code == 0
    assert "train.lr" in said.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = veneer("runs", "compare", runs / "small-1", runs / "small-2", "--out", picture)
    assert again.code == 2
    assert "--force" in again.err


def test_a_damaged_run_does_not_hide_the_others(veneer, runs):
    for file, content in (
        ("metrics.jsonl", '{"step": 1, "loss": "a"}\n{"step": 2, "eval_loss": null}\n[]\n{"st'),
        ("run.json", '{"state": [], "planned": "x", "made_of": 1, "inexact": {}, "judged_by": []}'),
        ("run.json", "[]"),
    ):
        (runs / "small-1" / file).write_text(content)
        said = veneer("runs", "--in", runs)
        assert said.code == 0
        assert "small-2" in said.out
        assert veneer("runs", "show", runs / "small-1").code == (2 if content == "[]" else 0)


def test_an_adapter_that_left_its_run_is_measured_on_rows(veneer, runs, rows, tmp_path):
    shutil.copytree(runs / "small-1/adapter", tmp_path / "alone")
    wanted = json.loads(veneer("evaluate", runs / "small-1", "--data", rows, "--json").out)
    found = json.loads(veneer("evaluate", tmp_path / "alone", "--data", rows, "--set", "dtype=float32", "--json").out)
    assert found["adapted"]["eval_loss"] == pytest.approx(wanted["adapted"]["eval_loss"], rel=1e-6)
    said = veneer("evaluate", tmp_path / "alone")
    assert said.code == 2
    assert "name some with --data" in said.err


def test_samples_are_taken_between_the_steps_and_change_nothing(veneer, runs, recipe, tmp_path):
    assert [path.name for path in sorted((runs / "small-1/samples").iterdir())] == [
        "answers.jsonl",
        "step-00000002.jsonl",
    ]
    veneer("train", recipe, "train.lr=1.0e-2", f"output={tmp_path / 'without'}")
    file = "small-1/adapter/adapter_model.safetensors"
    assert (tmp_path / "without" / file).read_bytes() == (runs / file).read_bytes()


def test_an_adapter_is_measured_again(veneer, runs, rows):
    found = json.loads(veneer("evaluate", runs / "small-1", "--json").out)
    assert found["adapted"]["eval_loss"] == pytest.approx(held_out(runs / "small-1"), rel=1e-6)
    assert found["adapted"]["eval_loss"] < found["base"]["eval_loss"]
    other = json.loads(veneer("evaluate", runs / "small-1", "--data", rows, "--no-base", "--json").out)
    assert list(other) == ["adapted"]
    assert other["adapted"]["eval_loss"] != found["adapted"]["eval_loss"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("runs", "--in", "nowhere"), "nowhere does not exist"),
        (("runs", "show", "nowhere"), "nowhere does not exist"),
        (("evaluate", "./nowhere"), "nowhere"),
        (("train", "causal-lm", "--sweep", "train.lr=1,1"), "values that differ"),
        (("train", "causal-lm", "--sweep", "train.lr"), "expected KEY=VALUE"),
        (("train", "causal-lm", "--sweep", "train.lr=1", "--dry-run"), "leave --dry-run and --allow-inexact out"),
        (("train", "causal-lm", "--sweep", "train.lr=1", "--sweep", "train.lr=2"), "train.lr is said twice"),
    ],
)
def test_what_is_not_there_is_said(veneer, arguments, words):
    said = veneer(*arguments)
    assert said.code == 2
    assert words in said.err


def test_tensorboard_is_told_what_metrics_say(veneer, recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert veneer("train", recipe, "log=[tensorboard]", "eval.answers=0").code == 0
    run = tmp_path / "runs/small-1"
    told = EventAccumulator(str(run / "tensorboard")).Reload()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "lr", "eval_loss"):
        wanted = [(record["step"], record[name]) for record in records if name in record]
        assert [(one.step, one.value) for one in told.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in wanted
        ]


def test_a_tracker_that_is_not_there_is_named_before_the_run(veneer, recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = veneer("train", recipe, "log=[wandb]")
    assert said.code == 2
    assert "pip install wandb" in said.err
    assert not list((tmp_path / "runs").iterdir())


def test_a_tracker_that_fails_is_one_sentence_and_the_run_goes_on_without_it(veneer, recipe, tmp_path, monkeypatch):
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def full(self, event):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(EventFileWriter, "add_event", full)
        said = veneer("train", recipe, "log=[tensorboard]", "eval.answers=0")
    assert said.code == 2
    assert "log: tensorboard does not work: [Errno 28] No space left on device; leave it out" in said.err
    assert not list((tmp_path / "runs").iterdir())  # nothing was learned yet
    assert veneer("train", recipe, "log=[]", "eval.answers=0").code == 0


def test_what_tensorboard_was_told_of_later_steps_goes(veneer, recipe, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from veneer.train.watch import Watch

    stepped = Watch.stepped

    def dying(self, record, steps):
        if record["step"] == 3:
            stepped(self, record, steps)
            self.run.untrack()  # all of it is on the disk
            raise KeyboardInterrupt
        return stepped(self, record, steps)

    keep = Watch.keep

    def keeping(self, step, seconds):
        if step == 2:
            keep(self, step, seconds)

    settings = ("log=[tensorboard]", "eval.answers=0", "checkpoint.every_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "stepped", dying)
        patch.setattr(
            Watch, "keep", lambda self, step, seconds, keep=Watch.keep: step == 2 and keep(self, step, seconds)
        )
        assert veneer("train", recipe, *settings).code == 130
    assert veneer("train", recipe, *settings, "--resume").code == 0
    told = EventAccumulator(str(tmp_path / "runs/small-1/tensorboard")).Reload()
    assert [one.step for one in told.Scalars("loss")] == [1, 2, 3, 4]


def test_lists_are_one_value():
    from veneer.cli.sweep import values_of

    assert values_of("adapter.target_modules=[q_proj, v_proj],all-linear") == [
        "adapter.target_modules=[q_proj, v_proj]",
        "adapter.target_modules=all-linear",
    ]


def test_a_picture_that_cannot_be_written(veneer, runs, tmp_path):
    (tmp_path / "file").write_text("")
    said = veneer("runs", "compare", runs / "small-1", runs / "small-2", "--out", tmp_path / "file" / "picture.png")
    assert said.code == 2
    assert "picture.png cannot be written" in said.err
