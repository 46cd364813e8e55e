"""Saving leaves the old adapter or the new one, and never one's config with the other's tensors."""

import os
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from veneer import Adapter, AdapterError, LoraConfig
from veneer.safe import whole

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Children save one adapter after the other into a folder until they are killed; the tensors hold the config's alpha.
KILLS = 100
KILLER = """
import os, random, signal, sys, time, warnings
import torch
from veneer import Adapter, LoraConfig
warnings.simplefilter("ignore")
rng, folder, kills = random.Random(0), sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)

def save(i):
    tensors = {"A": torch.full((2, 600), float(i)), "B": torch.full((500, 2), float(i))}
    Adapter(LoraConfig(r=2, lora_alpha=i, target_modules=["0"]), {"0": tensors}).save(folder)

save(0)
for kill in range(kills):
    child = os.fork()
    while child == 0:
        save(rng.randrange(10**6))
    time.sleep(rng.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    rng.seed(kill)
    adapter = Adapter.load(folder)
    alpha = adapter.config.lora_alpha
    assert all((tensor == alpha).all() for tensor in adapter.tensors["0"].values()), adapter
    print(alpha)
"""


def _adapter(alpha: float) -> Adapter:
    tensors = {"A": torch.full((2, 6), float(alpha)), "B": torch.full((5, 2), float(alpha))}
    return Adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"]), {"0": tensors})


def _held(folder: Path) -> float:
    """The alpha of the adapter in the folder, which its tensors hold too."""
    with warnings.catch_warnings(action="ignore"):
        adapter = Adapter.load(folder)
    assert all((tensor == adapter.config.lora_alpha).all() for tensor in adapter.tensors["0"].values())
    return adapter.config.lora_alpha


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_saver_killed_at_any_moment_leaves_one_adapter(tmp_path):
    run = [sys.executable, "-c", KILLER, str(tmp_path), str(KILLS)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert len(found) == KILLS
    assert len(set(found)) > KILLS // 4  # the others were killed before their first save


CALLS = ["open", "fstat", "close", "fsync", "replace", "write", "chmod"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["error", "stop"])
@pytest.mark.parametrize("name", CALLS)
def test_a_save_that_fails_at_any_call_leaves_one_adapter(tmp_path, monkeypatch, name, error):
    for fails_at in range(8):
        _adapter(1).save(tmp_path)
        calls, real = [0], getattr(os, name)

        def call(*args, calls=calls, real=real, fails_at=fails_at, **settings):
            calls[0] += 1
            if calls[0] == fails_at + 1:
                raise error
            return real(*args, **settings)

        with monkeypatch.context() as patched:
            patched.setattr(os, name, call)
            with suppress(AdapterError, KeyboardInterrupt):
                _adapter(2).save(tmp_path)
        assert _held(tmp_path) in (1, 2)
        assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


@pytest.fixture
def cut_short(tmp_path, monkeypatch):
    """New weights beside the old config."""
    _adapter(1).save(tmp_path)
    with monkeypatch.context() as patched:
        real = os.replace
        patched.setattr(whole.os, "replace", lambda a, b: real(a, b) if Path(b).name == WEIGHTS else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _adapter(2).save(tmp_path)
    return tmp_path


def test_a_save_cut_short_between_its_files_is_the_new_adapter_and_says_so(cut_short):
    with pytest.warns(UserWarning, match="was cut short"):
        assert Adapter.load(cut_short).config.lora_alpha == 2
    _adapter(2).save(cut_short)
    assert Adapter.load(cut_short).config.lora_alpha == 2


def test_a_config_that_is_edited_by_hand_is_read(cut_short):
    path = cut_short / CONFIG
    path.write_text(path.read_text().replace('"lora_alpha": 1', '"lora_alpha": 7'))
    assert Adapter.load(cut_short).config.lora_alpha == 7


def test_weights_beside_the_same_config_say_nothing_of_it(tmp_path):
    first = (_adapter(1).save(tmp_path) / WEIGHTS).read_bytes()
    assert (_adapter(1).save(tmp_path) / WEIGHTS).read_bytes() == first
