"""Several processes make the run that one makes; one that is killed ends it, and it goes on to the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

SHARING = Path(__file__).parents[1] / "train/sharing.py"


@pytest.fixture(scope="module")
def shared(tiny_base, tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    """The folder of all runs, and the exit codes."""
    folder = tmp_path_factory.mktemp("shared")
    rows = folder / "rows.jsonl"
    lines = [json.dumps({"prompt": f"name: Inn {i}\n", "completion": f"The Inn {i} is a pub."}) for i in range(40)]
    rows.write_text("\n".join(lines) + "\n")
    values = {
        "base": str(tiny_base),
        "dtype": "float32",
        "device": "cpu",
        "adapter": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1, "use_dora": True},
        "data": {"path": str(rows), "eval_share": 0.2},
        "train": {"steps": 10, "batch_size": 4, "accumulation": 2, "lr": 1.0e-2},
        "eval": {"every_steps": 4},
        "sample": {"count": 1, "max_new_tokens": 4},
        "checkpoint": {"every_steps": 2},
    }
    recipe = folder / "small.yaml"
    recipe.write_text(yaml.safe_dump(values))
    done = subprocess.run([sys.executable, str(SHARING), str(recipe)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def adapter(folder: Path, name: str) -> dict:
    (path,) = (folder / name).glob("*/adapter/adapter_model.safetensors")
    return load_file(path)


def losses(folder: Path, name: str) -> list[float]:
    (path,) = (folder / name).glob("*/metrics.jsonl")
    records = map(json.loads, path.read_text().splitlines())
    return [record.get("loss", record.get("eval_loss")) for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "srun", "spread"])
def test_two_processes_make_the_run_of_one(shared, name):
    folder, codes = shared
    assert codes["alone"] == [0]
    assert codes[name] == [0, 0], (folder / "log").read_text()[-2000:]
    assert losses(folder, name) == pytest.approx(losses(folder, "alone"), rel=1e-5)
    alone, other = adapter(folder, "alone"), adapter(folder, name)
    assert alone.keys() == other.keys()
    for key, tensor in alone.items():
        assert (tensor - other[key]).abs().max() <= 2e-5 * tensor.abs().max()


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_it_goes_on_to_the_same_bits(shared):
    folder, codes = shared
    first, second = codes["cut"]
    assert first == 2
    assert second == -9
    log = (folder / "log").read_text()
    assert "another process of the run has ended" in log
    assert log.count("goes on from step") == 1
    assert "Traceback" not in log
    assert codes["killed"] == codes["undisturbed"] == [0, 0]
    ends = [
        {key: tensor.tolist() for key, tensor in adapter(folder, name).items()} for name in ("killed", "undisturbed")
    ]
    assert ends[0] == ends[1]
    assert losses(folder, "killed") == losses(folder, "undisturbed")


@pytest.mark.slow
def test_what_one_process_cannot_read_is_said_once_and_ends_all(shared):
    folder, codes = shared
    assert codes["unreadable"] == [2, 2]
    assert (folder / "log").read_text().count("error: process 1: rows.jsonl, line 17 cannot be read") == 1
    assert len(losses(folder, "unreadable")) == 3  # before the first step, and two steps


@pytest.mark.slow
def test_two_processes_train_all_combinations(shared):
    folder, codes = shared
    assert codes["sweep"] == [0, 0], (folder / "log").read_text()[-2000:]
    assert len(list((folder / "sweep").glob("*/adapter/adapter_model.safetensors"))) == 2


@pytest.mark.slow
def test_launched_processes_fail_with_one_sentence_and_its_code():
    command = [sys.executable, "-m", "veneer", "train", "causal-lm", "train.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NPROC_PER_NODE": "2"})
    assert done.returncode == 2
    assert done.stderr.count("error: recipe causal-lm: unknown key 'train.lrr'") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("asked", ["0", "-1", "two"])
def test_how_many_processes_is_a_number(veneer, monkeypatch, asked):
    monkeypatch.setenv("NPROC_PER_NODE", asked)
    said = veneer("train", "causal-lm")
    assert said.code == 2
    assert f"NPROC_PER_NODE is {asked!r}" in said.err


def test_a_group_that_was_there_stays(monkeypatch):
    """A library that starts the processes itself ends their group itself."""
    import torch.distributed as dist

    from veneer.train.processes import join

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        join().leave()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_what_launchers_say_is_read(monkeypatch):
    from veneer.core.errors import AdapterError
    from veneer.train import processes

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert processes.join() == processes.ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AdapterError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not said"):
        processes.join()
