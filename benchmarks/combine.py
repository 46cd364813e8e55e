"""Combining five rank-16 adapters of SmolLM2-135M, against PEFT's add_weighted_adapter: python benchmarks/combine.py

The adapters have random factors on all linear layers, and weights of both signs. The true sum Σ wᵢ ΔWᵢ is formed in
fp64, layer by layer, from the factors; errors are ‖found - true‖ / ‖true‖ over all layers. Both sides alternate on one
model each; times are medians, and the ratio is the median over rounds. PEFT's `svd` takes minutes: fewer rounds.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import veneer
from veneer.apart.changes import adapter_of, changes
from veneer.combine import combine

warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks transformers for names of old
R, NAMES = 16, [f"a{i}" for i in range(5)]
WEIGHTS = [0.5, 0.3, -0.4, 0.8, 0.2]


def adapters(model: torch.nn.Module) -> list[veneer.Adapter]:
    """Five, with entries of A and B of the size that training gives."""
    made = []
    for seed in range(len(NAMES)):
        generator, own = torch.Generator().manual_seed(seed), {}
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and path != "lm_head":
                out, columns = module.weight.shape
                A = torch.randn(R, columns, generator=generator) / math.sqrt(columns)
                B = torch.randn(out, R, generator=generator) / 100
                own[path] = {"A": A, "B": B}
        config = veneer.LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear")
        # under the last parts of the paths, as PEFT reads them
        config.target_modules = sorted({path.rpartition(".")[2] for path in own})
        made.append(adapter_of(changes(veneer.Adapter(config, own)), like=veneer.Adapter(config, own)))
    return made


def sides(base: Path, folder: Path) -> tuple[dict[str, torch.nn.Module], list[veneer.Adapter]]:
    """The same base with the same adapters, in each library."""
    ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    made = adapters(ours)
    for name, adapter in zip(NAMES, made, strict=True):
        adapter.save(folder / name)
        if name == NAMES[0]:
            veneer.PeftModel.from_pretrained(ours, folder / name, name)
            theirs = peft.PeftModel.from_pretrained(theirs, folder / name, name)
        else:
            ours.load_adapter(folder / name, name)
            theirs.load_adapter(folder / name, name)
    return {"veneer": ours, "peft": theirs}, made


def true_sum(made: list[veneer.Adapter], path: str) -> Tensor:
    """Σ wᵢ · α / r · Bᵢ Aᵢ in fp64."""
    each = [(own.tensors[path]["B"].double(), own.tensors[path]["A"].double()) for own in made]
    return sum(weight * 2.0 * (B @ A) for weight, (B, A) in zip(WEIGHTS, each, strict=True))


def found(side: str, model: torch.nn.Module, path: str, name: str) -> Tensor:
    """ΔW of the combined adapter in fp64, from its factors and its scale."""
    if side == "veneer":
        A, B, scale = model.get_submodule(path).adapters[name].factors()
    else:
        layer = model.base_model.model.get_submodule(path)
        A, B, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    return (scale * (B.double() @ A.double())).detach()


@torch.no_grad()
def error(side: str, model: torch.nn.Module, made: list[veneer.Adapter], name: str) -> float:
    """Over all layers."""
    lost = square = 0.0
    for path in made[0].tensors:
        true = true_sum(made, path)
        lost += float((found(side, model, path, name) - true).square().sum())
        square += float(true.square().sum())
    return math.sqrt(lost / square)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(models: dict[str, torch.nn.Module], made: list[veneer.Adapter], rounds: int, how: str, **rank: int) -> None:
    """Alternate the two, and print times and errors."""
    times: list[dict[str, float]] = []
    errors: dict[str, float] = {}
    for _ in range(rounds):
        times.append({})
        for side, model in models.items():
            told = {"adapters": NAMES, "weights": WEIGHTS, "adapter_name": "sum", "combination_type": how, **rank}
            times[-1][side] = timed(lambda model=model, told=told: model.add_weighted_adapter(**told))
            errors.setdefault(side, error(side, model, made, "sum"))
            model.delete_adapter("sum")
    medians = {side: statistics.median(own[side] for own in times) for side in models}
    ratio = statistics.median(own["peft"] / own["veneer"] for own in times)
    what = how + "".join(f" of rank {number}" for number in rank.values())
    for side in models:
        print(f"{what:16}  {side:8}  {medians[side] * 1000:9.0f} ms  error {errors[side]:.3e}", flush=True)
    print(
        f"{what:16}  peft / veneer = {ratio:.2f} in time, {errors['peft'] / errors['veneer']:.6g} in error", flush=True
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--svd-rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models, made = sides(veneer.zoo.resolve(options.base), Path(folder))
        print(f"{len(NAMES)} adapters of rank {R} on {len(made[0].tensors)} layers, {torch.get_num_threads()} threads")
        compare(models, made, options.rounds, "linear")
        compare(models, made, options.rounds, "cat")
        compare(models, made, options.svd_rounds, "svd", svd_rank=R)
        pure = statistics.median(timed(lambda: combine(made, WEIGHTS)) for _ in range(options.rounds))
        print(f"combine() of the adapters as plain data, without a model: {pure * 1000:.0f} ms")


if __name__ == "__main__":
    main()
