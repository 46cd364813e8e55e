"""A run that was cut short goes on, and ends with the bits of an undisturbed one."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

KILLING = Path(__file__).parents[1] / "train/killing.py"


def sha(run: Path) -> str:
    return hashlib.sha256((run / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


def records(run: Path) -> list[dict]:
    """What was measured, but when."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key != "seconds"} for record in lines]


def steps(run: Path) -> list[int]:
    return [record["step"] for record in records(run) if "loss" in record]


@pytest.fixture
def hard(recipe) -> Path:
    """The recipe with dropout, accumulation, DoRA, packing and measurements between."""
    values = yaml.safe_load(recipe.read_text())
    values["adapter"] |= {"lora_dropout": 0.1, "use_dora": True}
    values["train"] |= {"steps": 10, "accumulation": 2}
    values["eval"] |= {"every_steps": 3, "answers": 0}
    values["sample"] = {"count": 0}
    values["checkpoint"] = {"every_steps": 2}
    recipe.write_text(yaml.safe_dump(values))
    return recipe


@pytest.fixture
def cut_at(monkeypatch):
    """`cut_at(step, number)`: the signal comes in the middle of this step."""
    from veneer.train.language.causal_lm import CausalLM

    loss = CausalLM.loss

    def at(step: int, number: int | None) -> None:
        calls = []

        def cutting(self, batch):
            calls.extend([1] * self.model.training)
            if number and len(calls) == 2 * step and self.model.training:
                signal.raise_signal(number)
            return loss(self, batch)

        monkeypatch.setattr(CausalLM, "loss", cutting)

    return at


@pytest.fixture
def undisturbed(veneer, hard, tmp_path) -> Path:
    assert veneer("train", hard, f"output={tmp_path / 'whole'}").code == 0
    return tmp_path / "whole/small-1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_the_run_goes_on_to_the_same_bits(
    veneer, hard, undisturbed, tmp_path, cut_at, number
):
    cut_at(5, number)
    said = veneer("train", hard)
    run = tmp_path / "runs/small-1"
    assert said.code == 128 + number
    assert f"train {run} --resume" in said.out
    assert steps(run) == [1, 2, 3, 4, 5]
    cut_at(5, None)
    said = veneer("train", hard, "--resume")
    assert said.code == 0
    assert f"{run} goes on from step 5" in said.err
    assert sha(run) == sha(undisturbed)
    assert steps(run) == steps(undisturbed) == list(range(1, 11))
    assert records(run) == records(undisturbed)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["small-1"]


def test_a_new_run_says_that_there_is_one_to_go_on_with(veneer, hard, tmp_path, cut_at):
    cut_at(3, signal.SIGINT)
    veneer("train", hard)
    cut_at(3, None)
    said = veneer("train", hard)
    assert "small-1 was cut short; --resume goes on with it" in said.err
    assert (tmp_path / "runs/small-2/adapter").is_dir()
    assert veneer("train", tmp_path / "runs/small-1", "--resume").code == 0
    assert sha(tmp_path / "runs/small-1") == sha(tmp_path / "runs/small-2")
    said = veneer("train", hard, "--resume")
    assert said.code == 2
    assert "nothing to resume" in said.err


def test_what_has_changed_is_named_and_refused(veneer, hard, tmp_path, cut_at, rows):
    cut_at(3, signal.SIGINT)
    veneer("train", hard)
    cut_at(3, None)
    said = veneer("train", hard, "train.lr=0.5", "adapter.r=8", "--resume")
    assert said.code == 2
    for words in ("adapter.r was 4 and is 8", "train.lr was 0.01 and is 0.5", "--allow-inexact"):
        assert words in said.err
    text = rows.read_text()
    rows.write_text(text.replace("Inn 7", "Inn 77"))
    said = veneer("train", hard, "--resume")
    assert said.code == 2
    assert "rows was" in said.err
    said = veneer("train", hard, "--resume", "--allow-inexact")
    assert said.code == 0
    assert "other bits" in said.err


def test_threads_and_packages_are_part_of_it(veneer, hard, tmp_path, cut_at, monkeypatch):
    cut_at(3, signal.SIGINT)
    veneer("train", hard)
    cut_at(3, None)
    facts = json.loads((tmp_path / "runs/small-1/run.json").read_text())
    facts["made_of"] |= {"threads": "77", "torch": "1.0"}
    (tmp_path / "runs/small-1/run.json").write_text(json.dumps(facts))
    said = veneer("train", hard, "--resume")
    assert said.code == 2
    assert "threads was 77" in said.err
    assert "torch was 1.0" in said.err


def test_without_room_a_run_ends_with_one_error_and_goes_on_later(veneer, hard, undisturbed, tmp_path, monkeypatch):
    from veneer.train.watch import Watch

    spec = importlib.util.spec_from_file_location("room", KILLING.parent / "test_checkpoint.py")
    room = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(room)
    keep = Watch.keep

    def tight(self, step, seconds):
        with room.files_of_at_most(10_000 if step == 6 else 2**40):
            keep(self, step, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "keep", tight)
        said = veneer("train", hard)
    run = tmp_path / "runs/small-1"
    assert said.code == 2
    assert "cannot write the checkpoint" in said.err
    assert "step-00000004 is as it was" in said.err
    assert veneer("train", hard, "--resume").code == 0
    assert sha(run) == sha(undisturbed)


def test_two_processes_do_not_share_a_run(veneer, hard, tmp_path, cut_at):
    from veneer.train.record import Run

    cut_at(3, signal.SIGINT)
    veneer("train", hard)
    held = Run(tmp_path / "runs/small-1")
    said = veneer("train", hard, "--resume")
    held.release()
    assert said.code == 2
    assert "still at work" in said.err


def test_the_best_measured_adapter_is_left_and_patience_ends_the_run(veneer, hard, tmp_path, monkeypatch):
    from veneer.train.language.causal_lm import CausalLM

    losses = iter([9.0, 5.0, 4.0, 6.0, 7.0, 8.0])
    sums = {}
    measured = CausalLM.evaluate

    def evaluate(self, whole):
        if whole:
            return measured(self, whole)
        value = next(losses)
        sums[value] = sum(p.double().sum().item() for p in self.model.parameters() if p.requires_grad)
        return {"eval_loss": value}

    monkeypatch.setattr(CausalLM, "evaluate", evaluate)
    said = veneer(
        "train", hard, "train.steps=100", "eval.every_steps=2", "eval.patience=2", "eval.keep=best", "checkpoint.keep=1"
    )
    assert said.code == 0
    assert "no better since step 6" in said.err
    assert "the adapter is that of step 6" in said.err
    from safetensors.torch import load_file

    left = load_file(tmp_path / "runs/small-1/adapter/adapter_model.safetensors")
    assert sum(tensor.double().sum().item() for tensor in left.values()) == pytest.approx(sums[4.0], rel=1e-9)
    assert max(steps(tmp_path / "runs/small-1")) == 10


@pytest.mark.slow
def test_killed_thirty_times_it_ends_with_the_same_bits(hard):
    done = subprocess.run(
        [sys.executable, str(KILLING), str(hard), "30", "1"], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr + (hard.parent / "log").read_text()[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] >= 30
    assert set(result["ends"]) == {result["undisturbed"]}
