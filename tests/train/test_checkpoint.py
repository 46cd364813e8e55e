"""A checkpoint is there whole or not at all; what is torn is passed over and stays."""

import json
import resource
from contextlib import contextmanager

import pytest
import torch

from veneer.core.errors import AdapterError
from veneer.train.checkpoint import Checkpoints, State, read


def state(step: int, size: int = 10) -> State:
    return State({"adapter/a": torch.full((size,), float(step)), "optimizer/a/step": torch.tensor(1.0)}, {"step": step})


@contextmanager
def files_of_at_most(size: int):
    """Any file that grows beyond is refused by the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_what_is_written_is_read(checkpoints):
    checkpoints.write(state(3), None)
    tensors, plain = checkpoints.newest(pytest.fail)
    assert plain == {"step": 3}
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "adapter/a": [3.0] * 10,
        "optimizer/a/step": 1.0,
    }


def test_the_newest_and_the_best_stay(checkpoints):
    for step in (2, 4, 6, 8, 10):
        checkpoints.write(state(step), best=4)
    assert names(checkpoints) == ["step-00000004", "step-00000008", "step-00000010"]
    assert checkpoints.at(4).plain["step"] == 4


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "short", "gone"])
def test_a_torn_checkpoint_is_passed_over_and_stays(checkpoints, file, how):
    for step in (2, 4):
        checkpoints.write(state(step), None)
    path = checkpoints.folder / "step-00000004" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content if how == "flipped" else content[:-1])
    said = []
    assert checkpoints.newest(said.append).plain["step"] == 2
    assert len(said) == 1
    assert "step-00000004" in said[0]
    assert "it is passed over" in said[0]
    checkpoints.write(state(4), None)
    assert checkpoints.newest(pytest.fail).plain["step"] == 4
    assert any("torn" in name for name in names(checkpoints))


def test_without_room_the_one_before_is_as_it_was(checkpoints):
    checkpoints.write(state(2), None)
    before = {path.name: path.read_bytes() for path in (checkpoints.folder / "step-00000002").iterdir()}
    for room in (0, 50, 200, 2000):
        with files_of_at_most(room), pytest.raises(AdapterError, match="step-00000002 is as it was"):
            checkpoints.write(state(4, size=10_000), None)
    assert names(checkpoints) == ["step-00000002"]
    assert {path.name: path.read_bytes() for path in (checkpoints.folder / "step-00000002").iterdir()} == before


def test_leftovers_of_the_killed_go(checkpoints):
    (checkpoints.folder / ".step-00000001.abc.part").mkdir(parents=True)
    checkpoints.write(state(2), None)
    assert names(checkpoints) == ["step-00000002"]


def test_what_is_no_checkpoint_is_not_read(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001/manifest.json").write_text(json.dumps([]))
    with pytest.raises(AdapterError, match="torn"):
        read(tmp_path / "step-00000001")
