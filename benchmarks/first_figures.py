"""veneer against PEFT on SmolLM2-135M, alternating in one run: python benchmarks/first_figures.py [--rounds 5]

adapting    get_peft_model with r=16 on all 210 linear layers
step        forward and backward of a batch of 16 shipped E2E rows, through the whole model with the plain loss
import      `import veneer` against `import torch`, and `veneer --help`, as whole processes

Prints medians, and the median of the ratios round by round.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import veneer
from veneer.recipes import SHIPPED

warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks transformers for names of old
CONFIG = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
SIDES = {"veneer": (veneer.get_peft_model, veneer.LoraConfig), "peft": (peft.get_peft_model, peft.LoraConfig)}


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes, begun without garbage of the calls before."""
    gc.collect()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def report(what: str, rounds: list[dict[str, float]]) -> None:
    """Medians of every side, and of the ratio of the second to the first."""
    first, second = list(rounds[0])
    medians = {side: statistics.median(times[side] for times in rounds) for side in rounds[0]}
    ratio = statistics.median(times[second] / times[first] for times in rounds)
    sides = ", ".join(f"{side} {value * 1000:.1f} ms" for side, value in medians.items())
    print(f"{what}: {sides}; {second} / {first} = {ratio:.2f} (median of {len(rounds)} rounds)", flush=True)


def batch(folder: Path, rows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids and labels of the first shipped rows, completions learned."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (SHIPPED / "data/e2e/train.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    pairs = [json.loads(line) for line in lines]
    prompts = [tokenizer(pair["facts"] + "\n").input_ids for pair in pairs]
    answers = [[*tokenizer(pair["sentence"]).input_ids, tokenizer.eos_token_id] for pair in pairs]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((rows, longest), tokenizer.eos_token_id)
    labels = torch.full((rows, longest), -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options = parser.parse_args()
    folder = veneer.zoo.resolve("smollm2-135m")
    ids, labels = batch(folder)

    def load(dtype: str) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    def adapted(side: str, dtype: str) -> torch.nn.Module:
        adapt, config = SIDES[side]
        return adapt(load(dtype), config(**CONFIG)).train()

    def step(model: torch.nn.Module) -> None:
        logits = model(input_ids=ids, attention_mask=(ids != -1).long(), use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()).backward()

    def adapting() -> dict[str, float]:
        fresh = {side: load("bfloat16") for side in SIDES}
        return {side: seconds(lambda s=side: SIDES[s][0](fresh[s], SIDES[s][1](**CONFIG))) for side in SIDES}

    adapting()  # the first call imports and fills caches
    report("adapting 210 layers", [adapting() for _ in range(options.rounds)])
    for dtype in options.dtypes:
        models = {side: adapted(side, dtype) for side in SIDES}
        for model in models.values():
            step(model)
        rounds = [{side: seconds(lambda m=models[side]: step(m)) for side in SIDES} for _ in range(options.rounds)]
        report(f"step of 16 × {ids.shape[1]} tokens, {dtype}", rounds)
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "import veneer": [sys.executable, "-c", "import veneer"],
        "from veneer import get_peft_model": [sys.executable, "-c", "from veneer import get_peft_model"],
    }
    quiet = {"stdout": subprocess.DEVNULL, "check": True}
    rounds = [
        {name: seconds(lambda c=command: subprocess.run(c, **quiet)) for name, command in commands.items()}
        for _ in range(options.rounds)
    ]
    for name in commands:
        print(f"{name}: {statistics.median(times[name] for times in rounds) * 1000:.0f} ms")
    script = shutil.which("veneer", path=str(Path(sys.executable).parent)) or "veneer"
    helps = [seconds(lambda: subprocess.run([script, "--help"], **quiet)) for _ in range(options.rounds)]
    print(f"veneer --help: {statistics.median(helps) * 1000:.0f} ms")


if __name__ == "__main__":
    main()
