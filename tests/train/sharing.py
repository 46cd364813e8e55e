"""One run in one process and in two, with the base whole and spread; and a process that is killed.

    python sharing.py RECIPE

prints a line of JSON: exit codes, and where the runs are.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from killing import attempt, ready


def together(
    recipe: str,
    output: Path,
    *more: str,
    kill_after: int | None = None,
    srun: bool = False,
    first: Callable[[], None] = lambda: None,
) -> list[int]:
    """Two processes, as torchrun (or srun) starts them; their exit codes. The second may die after some steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    numbers = ("RANK", "LOCAL_RANK")
    if srun:
        common = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port}
        numbers = ("SLURM_PROCID", "SLURM_LOCALID")
    children = [
        attempt(recipe, output, *more, first=first, **common, **dict.fromkeys(numbers, rank)) for rank in ("0", "1")
    ]
    if kill_after is not None:
        while len(_lines(output)) < kill_after:
            time.sleep(0.01)
        os.kill(children[1], signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _lines(output: Path) -> list[str]:
    return [line for path in output.glob("*/metrics.jsonl") for line in path.read_text().splitlines() if "loss" in line]


def unreadable_in_the_second() -> None:
    """Let the second process meet a row in its third step that cannot be used."""
    from veneer.core.errors import AdapterError
    from veneer.train.language.causal_lm import CausalLM

    batches = CausalLM.batches

    def reading(self, rows):
        if os.environ["RANK"] == "1" and self.step == 2:
            raise AdapterError("rows.jsonl, line 17 cannot be read")
        return batches(self, rows)

    CausalLM.batches = reading


def main(recipe: str) -> dict[str, list[int]]:
    ready(recipe)
    folder = Path(recipe).parent
    plain = ("adapter.lora_dropout=0", "train.batch_size=3")
    codes = {"alone": [os.waitstatus_to_exitcode(os.waitpid(attempt(recipe, folder / "alone", *plain), 0)[1])]}
    codes["two"] = together(recipe, folder / "two", *plain)
    codes["srun"] = together(recipe, folder / "srun", *plain, srun=True)
    codes["unreadable"] = together(recipe, folder / "unreadable", *plain, first=unreadable_in_the_second)
    codes["sweep"] = together(recipe, folder / "sweep", *plain, "train.steps=1", "--sweep", "train.lr=1e-2,1e-3")
    codes["spread"] = together(recipe, folder / "spread", *plain, "train.shard=always")
    codes["undisturbed"] = together(recipe, folder / "undisturbed")
    codes["cut"] = together(recipe, folder / "killed", kill_after=6)
    codes["killed"] = together(recipe, folder / "killed")
    return codes


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
