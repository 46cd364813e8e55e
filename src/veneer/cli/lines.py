"""Lines that a command gives: on stdout, or in a file; of several processes, one gives them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from veneer.core.errors import AdapterError
from veneer.safe.whole import write_whole


def speaks() -> bool:
    """Whether this process is the one of a run's that says what there is to say, as their launcher tells it."""
    rank = os.environ.get("SLURM_PROCID", "0") if "SLURM_STEP_NUM_TASKS" in os.environ else "0"
    return os.environ.get("RANK", rank) == "0"


def leave(lines: Sequence[str], out: Path | None) -> None:
    """Write them to the file, whole, and print its name; without one, print them. Raises `AdapterError`."""
    if out is None:
        sys.stdout.writelines(lines)
        return
    try:
        write_whole({out: lambda path: path.write_text("".join(lines), encoding="utf-8")})
    except OSError as error:
        raise AdapterError(f"{out} cannot be written: {error.strerror}") from error
    print(out)
