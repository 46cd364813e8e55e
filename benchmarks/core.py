"""The core against PEFT, alternating in one run: python benchmarks/core.py [--base smollm2-135m|llama-1b]

adapting · adding a 32nd adapter · switching · loading from disk · merging and unmerging · one token with one adapter,
beside the base's own time · 32 rows with 32 adapters, one token each, beside the base's own time · peak memory of a
training step (4 rows of 128 tokens, AdamW), each in a process of its own.

r=16 on every linear layer. Prints medians, and the median over rounds of PEFT's time by veneer's.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import veneer

warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks transformers for names of old
NUMBERS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
ADAPTERS = 32


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes, begun without garbage of the calls before."""
    gc.collect()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(what: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int, **extra) -> None:
    """Alternate the two, and others named in `extra`, and print medians and PEFT's time by veneer's."""
    sides = {"veneer": ours, "peft": theirs, **extra}
    for work in sides.values():
        work()
    times = [{name: seconds(work) for name, work in sides.items()} for _ in range(rounds)]
    medians = {name: statistics.median(t[name] for t in times) * 1000 for name in sides}
    ratio = statistics.median(t["peft"] / t["veneer"] for t in times)
    said = ", ".join(f"{name} {value:.3g} ms" for name, value in medians.items())
    beside = ""
    if "base" in sides:
        over = {name: statistics.median(t[name] / t["base"] for t in times) for name in ("veneer", "peft")}
        share = statistics.median((t["veneer"] - t["base"]) / (t["peft"] - t["base"]) for t in times)
        beside = f"; beside the base veneer × {over['veneer']:.2f}, peft × {over['peft']:.2f}"
        beside += f", what veneer adds is × {share:.2f} of what peft adds"
    print(f"{what}: {said}; peft / veneer = {ratio:.2f}{beside}", flush=True)


def load(base: str, dtype: torch.dtype) -> torch.nn.Module:
    """SmolLM2 from the zoo, or a randomly initialised Llama of 1.1 billion parameters."""
    if base == "llama-1b":
        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
        )
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    return AutoModelForCausalLM.from_pretrained(veneer.zoo.resolve(base), dtype=dtype).eval()


class Sides:
    """The same base with the same adapters, through each library."""

    def __init__(self, base: str, dtype: torch.dtype) -> None:
        self.bare = load(base, dtype)
        self.base, self.dtype = base, dtype

    def fresh(self) -> dict[str, torch.nn.Module]:
        """Two copies of the base, adapted; and how long that took."""
        models = {"veneer": load(self.base, self.dtype), "peft": load(self.base, self.dtype)}
        took = {
            "veneer": seconds(lambda: veneer.get_peft_model(models["veneer"], veneer.LoraConfig(**NUMBERS), "a0")),
            "peft": seconds(lambda: models.update(peft=peft.get_peft_model(models["peft"], _theirs(), "a0"))),
        }
        print(f"adapting: {took['peft'] * 1000:.1f} ms by peft / {took['veneer'] * 1000:.1f} ms", end=" ")
        print(f"= {took['peft'] / took['veneer']:.2f}", flush=True)
        return {name: model.eval() for name, model in models.items()}


def _theirs() -> peft.LoraConfig:
    return peft.LoraConfig(**NUMBERS)


def step(side: str, model: torch.nn.Module) -> dict[str, float]:
    """One training step; its peak memory, and what was there before, in GB."""
    adapt = {"veneer": (veneer.get_peft_model, veneer.LoraConfig), "peft": (peft.get_peft_model, peft.LoraConfig)}
    make, config = adapt[side]
    model = make(model, config(**NUMBERS)).train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    tokens = torch.randint(100, 1000, (4, 128), generator=torch.Generator().manual_seed(0))
    before = _peak()
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    return {"before": before, "peak": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def compare_memory(base: str, dtype: str) -> None:
    """A training step of each side in a process of its own."""
    peaks = {}
    for side in ("veneer", "peft"):
        run = [sys.executable, __file__, "--base", base, "--dtype", dtype, "--step", side]
        said = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        peaks[side] = json.loads(said)
    said = ", ".join(f"{side} {p['peak']:.2f} GB ({p['before']:.2f} before it)" for side, p in peaks.items())
    print(f"peak memory of a training step: {said}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", choices=["veneer", "peft"], help="only a training step of this side")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.step:
        print(json.dumps(step(options.step, load(options.base, dtype))))
        return
    compare_memory(options.base, options.dtype)
    sides = Sides(options.base, dtype)
    for _ in range(options.rounds - 1):
        sides.fresh()
    models = sides.fresh()
    ours, theirs = models["veneer"], models["peft"]
    for i in range(1, ADAPTERS - 1):
        ours.add_adapter(f"a{i}", veneer.LoraConfig(**NUMBERS))
        theirs.add_adapter(f"a{i}", _theirs())
    last = f"a{ADAPTERS - 1}"
    adding = {
        "ours": lambda: ours.add_adapter(last, veneer.LoraConfig(**NUMBERS)),
        "theirs": lambda: theirs.add_adapter(last, _theirs()),
    }
    times = []
    for i in range(options.rounds):
        times.append({name: seconds(work) for name, work in adding.items()})
        if i < options.rounds - 1:
            ours.delete_adapter(last), theirs.delete_adapter(last)
    ratio = statistics.median(t["theirs"] / t["ours"] for t in times)
    print(f"adding adapter {ADAPTERS}: veneer {times[-1]['ours'] * 1000:.1f} ms; peft / veneer = {ratio:.2f}")
    measure(sides.bare, ours, theirs, options.rounds)


@torch.no_grad()
def measure(bare: torch.nn.Module, ours: torch.nn.Module, theirs: torch.nn.Module, rounds: int) -> None:
    """What is done with adapters once they are there."""

    def switch(model: torch.nn.Module) -> None:
        model.set_adapter("a1")
        model.set_adapter("a0")

    def cycle(model: torch.nn.Module) -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    for model in (ours, theirs):
        model.requires_grad_(False)  # as adapters are that were loaded to be used
    one, many = torch.tensor([[7]]), torch.arange(7, 7 + ADAPTERS)[:, None]
    names = [f"a{i}" for i in range(ADAPTERS)]
    compare("switching, twice", lambda: switch(ours), lambda: switch(theirs), rounds)
    compare("one token, one adapter", lambda: ours(one), lambda: theirs(one), rounds * 4, base=lambda: bare(one))
    compare(
        f"{ADAPTERS} rows, {ADAPTERS} adapters, one token each",
        lambda: ours(many, adapter_names=names),
        lambda: theirs(many, adapter_names=names),
        rounds,
        base=lambda: bare(many),
    )
    compare("merging and unmerging", lambda: cycle(ours), lambda: cycle(theirs), rounds)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder, "a0")
        place = Path(folder)

        def reload(model: torch.nn.Module) -> None:
            model.delete_adapter("new") if "new" in model.peft_config else None
            model.load_adapter(place, "new")

        compare("loading from disk", lambda: reload(ours), lambda: reload(theirs), rounds)


if __name__ == "__main__":
    main()
