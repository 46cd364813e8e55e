"""From kohya's spelling to diffusers' and back, through veneer: the changes that the last file means, and the first."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import veneer.files
from peers import known, spelling
from peers.cases import Case
from peers.pipelines import Deltas, errors, layers
from peers.table import CASES

SOURCES = {"sd1": "kohya: sd1 with convolutions", "sdxl": "kohya: sdxl in sgm's words"}


def there_and_back(case: Case, folder: Path) -> Deltas:
    """What kohya's file means after it was diffusers' for a while, by kohya's own formula."""
    source = case.write(folder)
    there = veneer.files.write(veneer.files.read(source), folder / "diffusers.safetensors", "diffusers")
    back = veneer.files.write(veneer.files.read(there), folder / "kohya.safetensors", "kohya")
    return meant(case, back)


def meant(case: Case, path: Path) -> Deltas:
    """up · down · α / r of every module of a kohya file; SDXL's must be named as the original checkpoints name them."""
    file, found = load_file(path), {}
    for name, layer in layers(case.family).items():
        key = spelling.kohya(name, sgm=case.family == "sdxl", numbered=case.family == "sdxl")
        if f"{key}.lora_up.weight" not in file:
            continue
        up, down = (file.pop(f"{key}.lora_{which}.weight") for which in ("up", "down"))
        alpha = file.pop(f"{key}.alpha", torch.tensor(float(down.shape[0]))).item()
        found[f"{name}.weight"] = known.lora(layer, up, down, alpha / down.shape[0])
    assert not file, f"names that kohya's readers do not know: {sorted(file)[:3]}"
    return found


def largest_difference(family: str) -> float:
    case = CASES[SOURCES[family]]()
    with tempfile.TemporaryDirectory() as folder:
        return max(errors(there_and_back(case, Path(folder)), case.wanted).values())
