"""Files of every format, read by veneer and by a peer: python benchmarks/formats.py [--size 1.0] [--only kohya]

For each kind of file (those of tests/peers): how many weights it changes, the largest ‖ΔW − formula‖ / ‖formula‖ of
veneer and of the peer, and how many of the peer's are wrong. Then a file from kohya's spelling to diffusers' and back.
Then a synthetic LoRA of SDXL, `--size` GB in fp16: seconds and peak memory of `veneer inspect` and `veneer convert` as
whole processes, beside what starting Python with torch takes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", DIFFUSERS_VERBOSITY="critical", TRANSFORMERS_VERBOSITY="critical")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from peers import known, spelling
from peers.cases import Case
from peers.pipelines import errors, wrong
from peers.round_trip import SOURCES, largest_difference
from peers.sides import PEERS, through_veneer
from peers.table import CASES

SDXL = {  # the real one's shape
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
    "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def table(only: str) -> None:
    """A row for each kind of file, and one for each format with the sums and the largest differences."""
    print(f"{'file':54} {'weights':>7} {'veneer':>8}  {'peer':10} {'wrong':>5} {'others':>8}")
    whole: dict[str, list[tuple[int, float, int]]] = {}
    for name, build in CASES.items():
        if only not in name:
            continue
        case = build()
        with tempfile.TemporaryDirectory() as folder:
            path = case.write(Path(folder))
            ours = max(errors(through_veneer(case, path), case.wanted).values())
            peer, off = _peer(case, path)
        print(f"{name:54} {len(case.wanted):7} {ours:8.0e}  {peer}", flush=True)
        whole.setdefault(name.split(":")[0], []).append((len(case.wanted), ours, off))
    for form, rows in whole.items():
        weights, ours, off = zip(*rows, strict=True)
        print(f"{f'{form}, {len(rows)} files':54} {sum(weights):7} {max(ours):8.0e}  peers wrong in {sum(off)}")


def _peer(case: Case, path: Path) -> tuple[str, int]:
    """What to say of the peer, and in how many weights it is wrong; in all of a file that it does not read."""
    if not case.peer:
        return "no peer to be had", 0
    try:
        found = PEERS[case.peer](case, path)
    except Exception as error:
        return f"{case.peer:10} {len(case.wanted):5} refused: {type(error).__name__}", len(case.wanted)
    off = wrong(found, case.wanted)
    right = [error for name, error in errors(found, case.wanted).items() if name not in off]
    return f"{case.peer:10} {len(off):5} {f'{max(right):8.0e}' if right else '':>8}", len(off)


def large(path: Path, size: float) -> int:
    """A LoRA of SDXL's attention as kohya's trainers name it, of the rank that makes it so large; its rank."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Linear) and "attentions" in n}
    r = round(size * 1e9 / 2 / sum(layer.in_features + layer.out_features for layer in layers.values()))
    draw, tensors = known.normal(0), {}
    for name, layer in layers.items():
        key = spelling.kohya(f"unet.{name}", sgm=True)
        tensors[f"{key}.lora_up.weight"] = draw(layer.out_features, r).half()
        tensors[f"{key}.lora_down.weight"] = draw(r, layer.in_features).half()
        tensors[f"{key}.alpha"] = torch.tensor(r / 2).half()
    save_file(tensors, path, {"ss_network_dim": str(r), "ss_network_alpha": str(r / 2)})
    return r


# in a small process, since a process begins with the peak of the one that it was made from
_WATCHED = """
import json, os, sys, time
began = time.perf_counter()
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
child = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ, file_actions=quiet)
_, status, used = os.wait4(child, 0)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([status, time.perf_counter() - began, used.ru_maxrss * unit / 1e9]))
"""


def process(*words: str) -> tuple[float, float]:
    """Seconds and peak memory in GB of a Python process of its own."""
    said = subprocess.run([sys.executable, "-c", _WATCHED, *words], stdout=subprocess.PIPE, check=True).stdout
    status, seconds, memory = json.loads(said)
    if status:
        raise SystemExit(f"{words} failed")
    return seconds, memory


def commands(size: float, rounds: int) -> None:
    veneer = ("-c", "from veneer.cli import main; main()")
    with tempfile.TemporaryDirectory() as place:
        file, there, back = (str(Path(place) / f"{name}.safetensors") for name in ("kohya", "diffusers", "back"))
        r = large(Path(file), size)
        os.sync()  # or the first command would wait for it
        print(f"\nSDXL's attention at rank {r}, fp16, {os.path.getsize(file) / 1e9:.2f} GB (file in the page cache)")
        steps = {
            "python with torch alone": ("-c", "import torch"),
            "veneer inspect": (*veneer, "inspect", file),
            "veneer convert --to diffusers": (*veneer, "convert", file, there, "--to", "diffusers", "--force"),
            "veneer convert --to kohya": (*veneer, "convert", there, back, "--to", "kohya", "--force"),
        }
        for name, words in steps.items():
            taken = [process(*words) for _ in range(rounds)]
            seconds, memory = zip(*taken, strict=True)
            middle, least = statistics.median(seconds), min(seconds)  # what a disk takes varies
            print(f"{name:32} {middle:6.2f} s (least {least:.2f})  {max(memory):5.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.0, help="GB of the large file; 0 leaves it out")
    parser.add_argument("--only", default="", help="a part of the names of the kinds of file")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    table(options.only)
    for source in SOURCES if not options.only else ():
        print(f"{source} → diffusers → kohya: changes differ by {largest_difference(source):.0e} at most")
    if options.size:
        commands(options.size, options.rounds)


if __name__ == "__main__":
    main()
