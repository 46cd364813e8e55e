"""`veneer convert`: an adapter file in another format."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.outcome import Force, Precision, dtype_of
from veneer.core.errors import AdapterError, collapsed, listed
from veneer.safe.stored import is_near

if TYPE_CHECKING:
    from torch import dtype as Dtype

    from veneer.core.adapter import Adapter
    from veneer.core.config import LoraConfig

_LOST = 0.01  # of a tensor's norm, which a type may not take
_ONE_MODEL = "loralib"  # whose names say nothing of a pipeline's parts


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A file, a folder or a name of the library.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; for PEFT, the folder.")],
    to: Annotated[str, typer.Option("--to", help="peft, kohya, diffusers, lycoris, loralib or cloneofsimo.")],
    alpha: Annotated[float | None, typer.Option(help="What scales it, where the file does not say (loralib).")] = None,
    format: Annotated[str | None, typer.Option("--from", help="The format of IN, where it could be several.")] = None,
    dtype: Precision = None,
    part: Annotated[
        str | None,
        typer.Option(help="Of a pipeline's adapter, this part alone; of one model's, which part it is (unet, …)."),
    ] = None,
    force: Force = False,
) -> None:
    """Write an adapter in another format: the same ΔW, in the numbers that other programs read right."""
    from veneer import files, library

    if to in files.FORMATS and to not in files.FOLDERS and not out.suffix:
        raise AdapterError(f"{out} is a folder's name, and {to} is a file: {out}.safetensors, for example")
    place = library.find(source)
    adapter, found = files.recognised(place, format, alpha=alpha)
    print(f"read {place} ({found}): {_said(adapter)}")
    chosen = _of_type(_part(adapter, part, to), dtype_of(dtype))
    written = files.write(chosen, out, to, force=force)
    print(f"wrote {written} ({to}): {_said(chosen)}")
    for line in _differences(chosen, files.read(written, to)):
        print(f"  {line}")


def _part(adapter: "Adapter", part: str | None, to: str) -> "Adapter":
    """The part that is wanted, as the format names parts."""
    from veneer.files.parts import by_part, joined

    if part is None and to == _ONE_MODEL and adapter.parts:
        if len(adapter.parts) > 1:
            raise AdapterError(f"{to} is of one model, and this is of {listed(adapter.parts)}: choose one with --part")
        part = adapter.parts[0]
    if part is None:
        return adapter
    if adapter.parts and part not in adapter.parts:
        raise AdapterError(f"--part {part}: the adapter has {listed(adapter.parts)}")
    own = by_part(adapter)[part] if adapter.parts else adapter
    alone = to == _ONE_MODEL or (to == "peft" and adapter.parts)
    return own if alone else joined({part: own})


def _of_type(adapter: "Adapter", dtype: "Dtype | None") -> "Adapter":
    """The adapter in this precision. Raises `AdapterError` for values that are too large or too small for it."""
    if dtype is None:
        return adapter
    tensors = {path: {name: own.to(dtype) for name, own in every.items()} for path, every in adapter.tensors.items()}
    over = [
        f"{path}.{name}"
        for path, every in tensors.items()
        for name, own in every.items()
        if not own.isfinite().all() and adapter.tensors[path][name].isfinite().all()
    ]
    under = [
        f"{path}.{name}"
        for path, every in tensors.items()
        for name, own in every.items()
        if own.isfinite().all() and not is_near(own, adapter.tensors[path][name], _LOST)
    ]
    told = [f"too {size} for {str(dtype).removeprefix('torch.')}: {collapsed(names, 8)}"
            for size, names in (("large", over), ("small", under)) if names]  # fmt: skip
    if told:
        raise AdapterError("\n".join(told))
    return replace(adapter, tensors=tensors)


def _said(adapter: "Adapter") -> str:
    """Methods, layers by part, ranks."""
    from veneer.analyse.layers import named
    from veneer.apart.changes import beside, changes

    every = changes(adapter)
    methods = Counter(named(own.config) for own in every.values())
    ranks = sorted({own.config.r for own in every.values()})
    parts = [f"{part} {sum(path.startswith(f'{part}.') for path in every)}" for part in adapter.parts]
    said = [", ".join(methods), f"{len(every)} layers" + (f" ({', '.join(parts)})" if parts else "")]
    if ranks:
        said.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}")
    said += [f"{len(rest)} tensors trained whole"] if (rest := beside(adapter)) else []
    return ", ".join(filter(None, said))


def _differences(adapter: "Adapter", written: "Adapter") -> list[str]:
    """What is said in other numbers in the file, of the same ΔW."""
    from veneer.apart.changes import changes

    old, new = changes(adapter), changes(written)
    kept = [path for path in old if path in new and old[path].config.peft_type == new[path].config.peft_type]
    folded = [path for path in kept if _scale(old[path].config) != _scale(new[path].config)]
    wider = [path for path in kept if old[path].config.r < new[path].config.r]
    empty = [path for path in new if path not in old]
    lost = [key for key in adapter.metadata if key not in written.metadata]
    told = (
        ("layers whose scale is inside the factors now", folded),
        (f"layers filled up with zeros, to rank {max((new[path].config.r for path in wider), default=0)}", wider),
        ("layers more, all zero, which the format counts too", empty if len(kept) == len(old) else []),
        ("words of the file's own that have no place there", lost),
    )
    return [f"{what}: {len(found)}" for what, found in told if found]


def _scale(config: "LoraConfig") -> float:
    from veneer.core.config import scaling

    return scaling(config.r, config.lora_alpha, config.use_rslora)
