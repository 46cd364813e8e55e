"""A library of the test's own, and small genuine adapters to put into it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from veneer import Adapter, LoraConfig

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's folder, which is not there yet."""
    monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "library"))
    return tmp_path / "library"


@pytest.fixture
def peft(tmp_path: Path) -> Make:
    """`peft(1)` → a PEFT folder; another number, another content."""

    def make(number: float = 1, name: str = "", **settings: object) -> Path:
        tensors = {"A": torch.full((2, 6), float(number)), "B": torch.full((5, 2), float(number))}
        config = LoraConfig(r=2, target_modules=["0"], base_model_name_or_path="smollm2-135m", **settings)
        return Adapter(config, {"0": tensors}).save(tmp_path / "made" / (name or f"peft-{number}"))

    return make


@pytest.fixture
def kohya(tmp_path: Path) -> Make:
    """`kohya("hat")` → a kohya file, with what it says of itself."""

    def make(name: str = "hat", number: float = 1, **about: str) -> Path:
        layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        tensors = {
            f"{layer}.lora_down.weight": torch.full((2, 6), float(number)),
            f"{layer}.lora_up.weight": torch.full((5, 2), float(number)),
            f"{layer}.alpha": torch.tensor(2.0),
        }
        path = tmp_path / "made" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, metadata={key.replace("__", "."): text for key, text in about.items()} or None)
        return path

    return make
