"""A million rows prepared, and started with again: python benchmarks/data.py [--rows 1000000]

The shipped sample of E2E, over and over with other names, is written as JSONL to a temporary folder, with a cache
beside it. Two starts, each in a process of its own: seconds to read and split the rows, seconds to have their tokens,
the most memory over what the imports take, and the microseconds of a random row and of a step's choice of rows. Prints
the bytes that are kept.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLE = Path(__file__).parents[1] / "src/veneer/recipes/data/e2e/train.jsonl"
TEMPLATES = {"prompt": "Restaurant facts: {facts}\nThe facts in a sentence:", "completion": " {sentence}"}


def write_rows(path: Path, count: int) -> None:
    """The sample's rows over and over; the restaurants of each round have names of their own."""
    pairs = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    names = [re.match(r"name: ([^,]*)", pair["facts"])[1] for pair in pairs]
    with path.open("w", encoding="utf-8") as lines:
        for i in range(count):
            pair, name = pairs[i % len(pairs)], names[i % len(pairs)]
            other = f"{name} {i // len(pairs)}"
            row = {column: text.replace(name, other) for column, text in pair.items()}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def start(path: str, base: str) -> None:
    """One start, in this process."""
    from veneer.train.bases.loading import load_tokenizer
    from veneer.train.language.parts import read_documents, tokenised
    from veneer.train.language.settings import LanguageData
    from veneer.train.loop import rows_of
    from veneer.train.settings import TrainSettings

    tokenizer, data = load_tokenizer(Path(base)), LanguageData(path=path, **TEMPLATES)
    tokenizer("a")
    imports, began = peak(), time.perf_counter()
    sides = read_documents(data, seed=0)
    read = time.perf_counter()
    parts = [tokenised(side, tokenizer, data) for side in sides]
    done = time.perf_counter()
    most = peak() - imports
    examples = parts[0].examples
    chosen = random.Random(0).sample(range(len(examples)), 10_000)
    row = seconds(lambda: [examples[i] for i in chosen]) / len(chosen)
    settings = TrainSettings(batch_size=16)
    rows_of(0, settings, len(examples))
    step = seconds(lambda: [rows_of(step, settings, len(examples)) for step in range(100)]) / 100
    rows = sum(len(side) for side in sides)
    print(
        f"{rows:,} rows: read and split in {read - began:.1f} s, tokens in {done - read:.1f} s "
        f"({rows / (done - began):,.0f} rows/s), {most / 1e6:.0f} MB over the imports' {imports / 1e6:.0f}; "
        f"a random row {row * 1e6:.0f} µs, a step's rows {step * 1e6:.0f} µs",
        flush=True,
    )


def peak() -> float:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds(work) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Write the rows, start twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.start:
        start(*asked.start)
        return
    from veneer import zoo

    base = zoo.resolve("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, asked.rows)
        print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB", flush=True)
        for _ in range(2):
            environment = os.environ | {"VENEER_CACHE": folder, "HF_HUB_OFFLINE": "1"}
            subprocess.run([sys.executable, __file__, "--start", str(path), str(base)], env=environment, check=True)
        for store in sorted((Path(folder) / "rows").iterdir()):
            if store.is_dir():
                kept = sum(file.stat().st_size for file in store.iterdir())
                print(f"{store.name.partition('-')[0]}: {kept / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
