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

# how far the last file's changes may be from the first's: a scale in a factor is one rounding to the file's own dtype
SOURCES = {
    "kohya: sd1 with convolutions": 1e-7,
    "kohya: sdxl in sgm's words": 1e-7,
    "kohya: sd1, alpha in some": 1e-7,
    "kohya: sd1 in fp16": 1e-3,
    "kohya: sd1 in bf16": 0.0,
    "kohya: sd1, one rank and alpha": 0.0,
}


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


def largest_difference(source: str) -> float:
    """‖last − first‖ / ‖first‖ of the weight where it is largest."""
    case = CASES[source]()
    with tempfile.TemporaryDirectory() as folder:
        return max(errors(there_and_back(case, Path(folder)), case.wanted).values())
