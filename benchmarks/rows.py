"""A training of many short rows, from its command to its first step: python benchmarks/rows.py [--rows 2000000]

The rows (a prompt of a few words, a completion) are written to a temporary folder, with a cache beside them, and a tiny
Llama is trained on them twice by `veneer train`, a process each: the first reads, splits and tokenises, the second
finds the tokens in the cache. Prints for each the seconds from the command to the end of its first step, the most
memory of its process, and the bytes of file and cache; and the memory of a run of 1,000 rows, for comparison.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kills import prepare

SMALL = 1000


def write_rows(path: Path, count: int) -> None:
    """Rows that all differ."""
    with path.open("w", encoding="utf-8") as lines:
        for i in range(count):
            lines.write(f'{{"prompt": "name: Inn {i}\\n", "completion": "The Inn {i} is a pub near {i % 977}."}}\n')


def started(recipe: Path, rows: Path, output: Path, cache: Path) -> tuple[float, float]:
    """(seconds until the first step is done, the most GB of the process)."""
    overrides = [f"data.path={rows}", f"output={output}", "data.eval_share=0.001", "checkpoint.every_steps=null"]
    command = [sys.executable, "-m", "veneer", "train", str(recipe), *overrides, "train.steps=3", "sample.count=0"]
    began = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "VENEER_CACHE": str(cache)}, **quiet)
    first, ended = 0.0, (0, 0, None)
    metrics = output / "small-1/metrics.jsonl"
    while not first and not ended[0]:
        time.sleep(0.02)
        ended = os.wait4(process.pid, os.WNOHANG)
        if metrics.exists() and '"loss"' in metrics.read_text():
            first = time.perf_counter() - began
    _, status, used = ended if ended[0] else os.wait4(process.pid, 0)
    if status or not first:
        raise SystemExit(f"the run failed: {' '.join(command)}")
    return first, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = prepare(folder)
        for count in (SMALL, options.rows):
            rows, cache = folder / f"{count}.jsonl", folder / f"cache-{count}"
            write_rows(rows, count)
            for start in ("first", "second"):
                seconds, peak = started(recipe, rows, folder / f"{count}-{start}", cache)
                kept = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 1e6
                print(
                    f"{count:,} rows ({rows.stat().st_size / 1e6:.0f} MB), {start} start: {seconds:.1f} s to the first "
                    f"step, peak {peak:.2f} GB, {kept:.0f} MB kept",
                    flush=True,
                )


if __name__ == "__main__":
    main()
