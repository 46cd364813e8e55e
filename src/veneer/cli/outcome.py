"""What a command that makes an adapter leaves: a file or folder, and a table of its ranks and errors."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.core.errors import AdapterError, listed

if TYPE_CHECKING:
    from torch import dtype as Dtype

    from veneer.combine import Errors
    from veneer.core.adapter import Adapter

Out = Annotated[Path, typer.Option("--out", help="What to write: a folder (PEFT's), or a .safetensors file.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--to",
        help="The format to write: peft, kohya, diffusers, …; if not said, the first adapter's, or as OUT looks.",
    ),
]
Precision = Annotated[str | None, typer.Option("--dtype", help="Of the tensors: float32, float16 or bfloat16.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]
_FILE = ".safetensors"
_OWN = "veneer"  # a folder which is PEFT's, where PEFT has such adapters
_SOON = 2.0  # seconds of work before its progress is shown


def format_of(out: Path, format: str | None, sources: Iterable[Path], force: bool) -> str:
    """The format to write. Raises `AdapterError` for what is there already, before any work is done."""
    from veneer import files

    if out.exists() and not force and (out.is_file() or any(out.iterdir())):
        raise AdapterError(f"{out} exists already; nothing was written (--force replaces it)")
    is_file = out.suffix == _FILE
    if not is_file and format is None:
        return _OWN
    found = [format] if format else [files.detect(source) for source in sources]
    for name in found:
        if (name == "peft") != is_file:
            return name
    raise AdapterError(
        f"--out {out} is a {'file' if is_file else 'folder'}: "
        f"{'say its format, --to kohya for example' if is_file else f'for {format} name a file, {out}{_FILE}'}"
    )


def dtype_of(name: str | None) -> "Dtype | None":
    """Raises `AdapterError` for what is none."""
    import torch

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name is not None and name not in known:
        raise AdapterError(f"--dtype: expected one of {listed(known, say=str)}, found {name!r}")
    return known[name] if name else None


def left(adapter: "Adapter", errors: "Errors", out: Path, format: str, force: bool) -> None:
    """Write it, and say what it is."""
    from veneer import files
    from veneer.apart.changes import changes

    kinds = {change.config.peft_type for change in changes(adapter).values()}
    if format == _OWN and not adapter.parts and (len(kinds) > 1 or "FULL" in kinds):
        adapter.save(out)
        told = f"veneer's own folder: PEFT has no adapter of {listed(sorted(kinds), say=str)}"
    else:
        told = "peft" if format == _OWN else format
        files.write(adapter, out, told, force=force)
    _print(adapter, errors)
    print(f"{out} ({told})")


def progress(what: str) -> Callable[[int, int], None]:
    """Shows on stderr how far the work is."""
    from veneer.cli.terminal import TerminalReporter

    reporter, began = TerminalReporter(), time.monotonic()

    def show(done: int, total: int) -> None:
        if time.monotonic() - began > _SOON:
            reporter.progress(what, done, total)

    return show


def _print(adapter: "Adapter", errors: "Errors") -> None:
    from rich.console import Console
    from rich.table import Table

    from veneer.analyse.roles import role_of
    from veneer.apart.changes import changes

    every = changes(adapter)
    roles: dict[str, list[str]] = {}
    for path in every:
        roles.setdefault(role_of(path), []).append(path)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("role", "layers", "rank", "error", "largest"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "role" else "right")
    for role, paths in roles.items():
        ranks = sorted({every[path].config.r for path in paths if every[path].config.peft_type == "LORA"})
        full = [path for path in paths if every[path].config.peft_type != "LORA"]
        said = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else ""
        said = ", ".join(filter(None, [said, "full" if full else ""]))
        largest = max(errors.layers.get(path, 0.0) for path in paths)
        table.add_row(role, str(len(paths)), said, _share(errors.of(paths)), _share(largest))
    Console(highlight=False).print(table)
    print(f"error in all, ‖ΔW - BA‖ / ‖ΔW‖: {_share(errors.total)}")


def _share(value: float) -> str:
    return f"{value:.2%}" if value > 1e-5 else "none"
