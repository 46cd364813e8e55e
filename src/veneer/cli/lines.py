"""Lines that a command gives: on stdout, or in a file."""

import sys
from collections.abc import Sequence
from pathlib import Path

from veneer.core.errors import AdapterError
from veneer.safe.whole import write_whole


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
