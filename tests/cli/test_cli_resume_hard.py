"""What a run is held to when it goes on: its end, its places, its recipe, and what it keeps."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

END = -1
FILLING = Path(__file__).parents[1] / "train/filling.py"


def records(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key != "seconds"} for record in lines]


def bits(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


@pytest.fixture
def cut(veneer, recipe, tmp_path, monkeypatch):
    """`cut(3, *overrides)`: the run after Ctrl-C in its third step; `cut(None)`, before its end was measured, and
    `cut(END)`, after that.
    """
    from veneer.train import run
    from veneer.train.watch import Watch

    def at(step: int | None, *overrides: str) -> Path:
        stepped = Watch.stepped

        def cutting(self, record, steps):
            if record["step"] == step:
                signal.raise_signal(signal.SIGINT)
            return stepped(self, record, steps)

        def pressed(watch, result):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Watch, "stepped", cutting)
            if step is None:
                patch.setattr(run, "_finish", pressed)
            if step == END:
                patch.setattr(Watch, "samples", pressed)
            assert veneer("train", recipe, "eval.answers=0", *overrides).code == 130
        return tmp_path / "runs/small-1"

    return at


@pytest.fixture
def whole(veneer, recipe, tmp_path):
    """`whole(*overrides)`: the run that nothing disturbed."""

    def made(*overrides: str) -> Path:
        said = veneer("train", recipe, "eval.answers=0", *overrides, f"output={tmp_path / 'whole'}")
        assert said.code == 0, said.err
        return tmp_path / "whole/small-1"

    return made


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.steps=30", "train.lr=1.0e-9", "eval.every_steps=2", "eval.patience=2"),
        ("eval.every_steps=2",),
        ("eval.every_steps=2", "eval.keep=best"),
    ],
    ids=["patience", "last", "best"],
)
@pytest.mark.parametrize("when", [None, END], ids=["before", "after"])
def test_a_run_that_was_at_its_end_ends_there(veneer, recipe, cut, whole, overrides, when):
    run = cut(when, *overrides)
    assert veneer("train", run, "--resume").code == 0
    undisturbed = whole(*overrides)
    assert records(run) == records(undisturbed)
    assert bits(run) == bits(undisturbed)


def test_a_base_and_rows_of_the_same_bytes_may_be_elsewhere(veneer, recipe, cut, whole, rows, tiny_base, tmp_path):
    run = cut(2)
    shutil.copytree(tiny_base, tmp_path / "base")
    rows.rename(tmp_path / "moved.jsonl")
    places = (f"base={tmp_path / 'base'}", f"data.path={tmp_path / 'moved.jsonl'}")
    said = veneer("train", run, *places, "--resume")
    assert said.code == 0, said.err
    assert bits(run) == bits(whole(*places))
    assert yaml.safe_load((run / "recipe.yaml").read_text())["base"] == str(tmp_path / "base")


def test_what_was_allowed_to_change_stays_so_and_is_known(veneer, recipe, cut):
    run = cut(1)
    with_other = ("train", recipe, "eval.answers=0", "train.lr=0.5", "--resume")
    assert veneer(*with_other).code == 2
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["lr"] == 0.01
    assert veneer(*with_other, "--allow-inexact").code == 0
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["lr"] == 0.5
    rates = [record["lr"] for record in records(run) if "lr" in record]
    assert max(rates[:1]) <= 0.01 < max(rates[1:])
    assert "from step 1 on: the recipe has changed: train.lr was 0.01 and is 0.5" in veneer("runs", "show", run).out


def test_torn_checkpoints_stay_where_a_resumed_run_cannot_begin(veneer, recipe, cut, monkeypatch):
    from veneer.train.watch import Watch

    run = cut(2)
    (run / "checkpoints/step-00000002/state.json").write_text("torn")
    (run / "metrics.jsonl").write_text("")

    def pressed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "before", pressed)
        assert veneer("train", run, "--resume").code == 130
    assert (run / "checkpoints/step-00000002/state.json").read_text() == "torn"
    assert veneer("train", run, "--resume").code == 0


def test_where_the_best_checkpoint_is_damaged_the_last_adapter_is_left_and_it_is_said(
    veneer, recipe, monkeypatch, whole, tmp_path
):
    from veneer.train.watch import Watch

    back = Watch.back_to_best

    def damaging(self, step):
        self.counters.best_step = 2
        (self.run.folder / "checkpoints/step-00000002/state.json").write_text("torn")
        return back(self, step)

    monkeypatch.setattr(Watch, "back_to_best", damaging)
    said = veneer("train", recipe, "eval.answers=0", "eval.every_steps=2", "eval.keep=best")
    assert said.code == 0
    assert "is damaged" in said.err
    assert "the adapter is that of step 4, the last, and not that of step 2" in said.err
    monkeypatch.undo()
    assert bits(tmp_path / "runs/small-1") == bits(whole())


def test_a_sweep_goes_on_and_one_failure_does_not_end_it(veneer, recipe, tmp_path, monkeypatch):
    from veneer.train.watch import Watch

    stepped = Watch.stepped
    calls = []

    def cutting(self, record, steps):
        calls.append(record["step"])
        if len(calls) == 6:  # in the second run
            signal.raise_signal(signal.SIGTERM)
        return stepped(self, record, steps)

    axes = (
        "--sweep",
        "train.lr=1.0e-2,1.0e-3",
        "--sweep",
        "adapter.target_modules=[q_proj],[nothing]",
        "eval.answers=0",
    )
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "stepped", cutting)
        said = veneer("train", recipe, *axes)
    assert said.code == 128 + signal.SIGTERM
    said = veneer("train", recipe, *axes, "--resume")
    assert said.code == 2
    assert "2 of 4 runs failed; the first: target_modules: 'nothing' matches no module" in said.err
    assert "small-1 came to its end before" in said.err
    assert "small-2 goes on from step 2" in said.err
    assert [line.split()[-1] for line in said.out.splitlines()[1:5]] == ["small-1", "failed", "small-2", "failed"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["small-1", "small-2"]
    for name, lr in (("small-1", "1.0e-2"), ("small-2", "1.0e-3")):
        alone = (f"train.lr={lr}", "adapter.target_modules=[q_proj]", f"output={tmp_path / name}", "eval.answers=0")
        assert veneer("train", recipe, *alone).code == 0
        assert bits(tmp_path / name / "small-1") == bits(tmp_path / "runs" / name)


def test_a_sweep_over_rows_takes_each_run_for_its_own(veneer, recipe, rows, tmp_path):
    shutil.copy(rows, tmp_path / "other.jsonl")
    axes = ("--sweep", f"data.path={rows},{tmp_path / 'other.jsonl'}", "eval.answers=0", "train.steps=1")
    for named in (["small-1", "small-2"], ["small-1", "small-2"]):
        said = veneer("train", recipe, *axes, "--resume")
        assert said.code == 0
        assert [line.split()[-1] for line in said.out.splitlines() if line.split()[-1] in named] == named
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.slow
def test_a_full_disk_at_any_write_is_one_sentence_and_the_run_goes_on_to_the_same_bits(recipe):
    overrides = ("eval.answers=0", "eval.every_steps=2", "sample.every_steps=3", "checkpoint.every_steps=2")
    command = [sys.executable, str(FILLING), str(recipe), "5", "37", *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + (recipe.parent / "log").read_text()[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tried"] >= 4
    assert result["wrong"] == []
    assert set(result["ends"]) == {result["undisturbed"]}
