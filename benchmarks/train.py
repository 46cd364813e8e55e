"""Training against transformers' Trainer with PEFT: python benchmarks/train.py [--rows e2e long 1b fp32] [--steps 50]

e2e    SmolLM2-135M, 16 pairs of E2E a step, their sentences learned     long   4 rows of 512 tokens, all learned
1b     a randomly initialised Llama of 1.1 billion, 4 rows of 256        fp32   as e2e, both sides in float32

veneer runs beside each peer in turn, both in processes of their own: one optimizer step each, who is first alternating,
the same rows, from the same adapter. Prints medians, and the median over the steps of the peer's time by veneer's; each
process's peak memory; the losses side by side, and the held-out loss of every adapter through one and the same model.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turns import Process

PEFT = ("peft bf16, dropout", "peft bf16", "peft autocast")
VENEER = "veneer"
AGREE = 0.5  # percent of a loss, without dropout
SIDES: dict[str, dict[str, Any]] = {
    VENEER: {"dropout": 0.0},
    "veneer, dropout": {"dropout": 0.05},
    "peft bf16, dropout": {"dropout": 0.05, "dtype": "bfloat16"},
    "peft bf16": {"dropout": 0.0, "dtype": "bfloat16"},
    "peft autocast": {"dropout": 0.0, "dtype": "float32", "autocast": True},
    "peft fp32": {"dropout": 0.0, "dtype": "float32"},
}


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    batch: int
    length: int | None
    others: tuple[str, ...]
    base: str = "smollm2-135m"
    dtype: str = "auto"


ROWS = {
    "e2e": Row(16, None, PEFT),
    "long": Row(4, 512, PEFT),
    "1b": Row(4, 256, ("peft bf16",), base="llama-1b"),
    "fp32": Row(16, None, ("peft fp32",), dtype="float32"),
}


def train_side(turn: Any, job: Any, name: str) -> None:
    """A side's training, a step a turn."""
    import train_sides

    side = train_sides.veneer_side if name.startswith("veneer") else train_sides.peft_side
    side(job, turn, job.folder / name, **SIDES[name])


def measure(row: Row, others: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """veneer beside each of the others: every step as it came, and the held-out losses at the end."""
    from train_sides import Job, evaluate, prepare

    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), row.base, row.batch, row.length, row.dtype, options.steps, options.data, options.veneer)
        found = Process(prepare, job).take()
        found["runs"] = {other: take_turns(job, (VENEER, other), found["tokens"]) for other in others}
        folders = {"start": job.start, **{name: job.folder / name for name in (VENEER, *others)}}
        found["held-out"] = Process(evaluate, job, folders).take()
    return found


def take_turns(job: Any, names: tuple[str, str], tokens: list[int]) -> dict[str, list[dict[str, float]]]:
    """Two sides' steps; only two at a time, so that both find memory enough."""
    sides = {name: Process(train_side, job, name, name=name) for name in names}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for side in sides.values():
        side.take()
    for step, expected in enumerate(tokens):
        for name in names if step % 2 else reversed(names):
            record = sides[name].turn()
            if record.get("tokens", expected) != expected:
                raise SystemExit(f"step {step + 1}: {name} read {record['tokens']} tokens, not {expected}: other rows")
            steps[name].append(record)
        print(f"{step + 1}/{job.steps} {' | '.join(names)}", end="\r", file=sys.stderr)
    for side in sides.values():
        side.turn()
    return steps


def summary(row: Row, found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of each side. The first two steps, in which things are made ready, are not timed."""
    skip = min(2, len(found["tokens"]) - 1)
    runs = found["runs"]
    every = [step["seconds"] for run in runs.values() for step in run[VENEER][skip:]]
    table = {VENEER: _figures(row, found, VENEER, next(iter(runs.values()))[VENEER], every)}
    for other, run in runs.items():
        ours, theirs = ([step["seconds"] for step in run[name]][skip:] for name in (VENEER, other))
        table[other] = figures = _figures(row, found, other, run[other], theirs)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        figures["time ×"], figures["least"], figures["most"] = statistics.median(ratios), min(ratios), max(ratios)
        figures["memory ×"] = table[VENEER]["peak GB"] / figures["peak GB"]
        figures["loss off %"] = 100 * (table[VENEER]["loss"] / figures["loss"] - 1)
        figures["held-out off %"] = 100 * (table[VENEER]["held-out"] / figures["held-out"] - 1)
    return table


def _figures(
    row: Row, found: dict[str, Any], name: str, steps: list[dict[str, float]], seconds: list[float]
) -> dict[str, float]:
    took = statistics.median(seconds)
    bound = found["flops"] / max(found["rates"].values())  # seconds
    return {
        "s/step": took,
        "first": steps[0]["seconds"],
        "examples/s": row.batch / took,
        "learned/s": statistics.mean(found["learned"]) / took,
        "% of bound": 100 * bound / took,
        "peak GB": steps[-1]["peak"] / 1e9,
        "loss": statistics.mean(step["loss"] for step in steps),
        "held-out": found["held-out"][name],
    }


def show(name: str, row: Row, found: dict[str, Any]) -> None:
    """The bound, the table, and the losses step by step."""
    steps, table = len(found["tokens"]), found["table"]
    tokens, learned = (sum(found[what]) / steps / row.batch for what in ("tokens", "learned"))
    print(f"## {name}: {row.base}, {steps} steps of {row.batch} rows of {tokens:.1f} tokens, {learned:.1f} learned")
    rates = ", ".join(f"{rate / 1e9:.0f} in {dtype}" for dtype, rate in found["rates"].items())
    bound, gflop = row.batch * max(found["rates"].values()) / found["flops"], found["flops"] / row.batch / 1e9
    print(f"bound: {gflop:.1f} GFLOP an example; GFLOP/s: {rates}; at the better {bound:.2f} examples/s")
    columns = list(dict.fromkeys(column for figures in table.values() for column in figures))
    wide = max(map(len, table))
    print(" " * wide, *(f"{column:>10}" for column in columns))
    for side, figures in table.items():
        print(f"{side:{wide}}", *(f"{figures[c]:>{max(10, len(c))}.4g}" for c in columns if c in figures))
    print(f"held-out loss of the adapter at the start: {found['held-out']['start']:.4f}")
    for side, figures in table.items():
        if side != VENEER and not SIDES[side]["dropout"]:
            off = max(abs(figures["loss off %"]), abs(figures["held-out off %"]))
            print(f"losses of veneer and {side}: {'agree' if off <= AGREE else 'DIFFER'}, {off:.2f} % at most")
    runs = {VENEER: next(iter(found["runs"].values()))} | found["runs"]
    print("step", *(f"{side:>{max(10, len(side))}}" for side in table))
    for step in range(steps):
        losses = [f"{runs[side][side][step]['loss']:>{max(10, len(side))}.4f}" for side in table]
        print(f"{step + 1:4}", *losses, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--beside", nargs="+", choices=list(SIDES)[1:], help="veneer beside these, not the row's own")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--data", help="E2E as a file of facts||sentence; without it, the shipped sample")
    parser.add_argument("--veneer", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of veneer's recipe")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    options.veneer = tuple(options.veneer)
    began, all_found = time.strftime("%Y-%m-%d %H:%M"), {}
    for name in options.rows:
        row = ROWS[name]
        found = measure(row, options.beside or list(row.others), options)
        found["table"] = summary(row, found)
        all_found[name] = found
        show(name, row, found)
        if options.json:
            told = {"began": began, "veneer": options.veneer, "data": options.data, "rows": all_found}
            options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
