"""A cache that is killed while it is made, and one that two processes make together.

    python cutting.py FOLDER

prints a line of JSON: the keys that each process made, and what is there in the end.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from veneer.train.diffusion.cache import Kept, chunks, kept
from veneer.train.task import Reporter

KEYS = [f"picture {number}" for number in range(400)]


def made(log: Path, die_at: str | None, keys: Sequence[str]):
    """A number for each key, told in the log."""
    for key in keys:
        with log.open("a") as lines:
            print(key, file=lines)
        if key == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.0005)
        yield {"number": torch.tensor([int(key.split()[1])])}


def build(kind: str, log: Path, die_at: str | None = None) -> Kept:
    return kept(kind, {}, KEYS, partial(made, log, die_at), kind, Reporter())


def child(work: Callable[[], object]) -> int:
    """The process that does this and ends."""
    if number := os.fork():
        return number
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def ended(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def together(folder: Path, rank: int) -> None:
    where = f"file://{folder}/group"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    build("together", folder / f"rank-{rank}")
    torch.distributed.barrier()


def main(folder: Path) -> dict[str, object]:
    runs = list(chunks(KEYS))
    killed = ended(child(lambda: build("killed", folder / "first", runs[3][-1])))
    torn = [path.name for path in (folder / "cache/rows").glob("killed-*") if not (path / "index.json").is_file()]
    found = build("killed", folder / "second")
    ranks = [child(partial(together, folder, rank)) for rank in range(2)]
    return {
        "killed": killed,
        "torn": torn,
        "whole": sum(map(len, runs[:3])),
        "second": (folder / "second").read_text().splitlines(),
        "numbers": [int(found[key]["number"]) for key in KEYS],
        "leftovers": [path.name for path in (folder / "cache/rows").glob(".*.part")],
        "codes": [ended(rank) for rank in ranks],
        "together": [(folder / f"rank-{rank}").read_text().splitlines() for rank in range(2)],
    }


if __name__ == "__main__":
    os.environ["VENEER_CACHE"] = f"{sys.argv[1]}/cache"
    print(json.dumps(main(Path(sys.argv[1]))))
