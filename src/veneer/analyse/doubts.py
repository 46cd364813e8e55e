"""What makes one doubt a file before any value is read: its numbers, its types, and what it claims."""

from collections import Counter
from collections.abc import Iterable, Mapping

from veneer.analyse.family import Base
from veneer.analyse.layers import Layer
from veneer.core.errors import collapsed, listed, shown

_LARGEST_SCALE = 16  # usual are 0.5 to 2; rsLoRA's of rank 64 at alpha 128 is 16


def doubts_of(layers: Iterable[Layer], dtypes: Mapping[str, int], base: Base, metadata: Mapping[str, str]) -> list[str]:
    """A sentence each."""
    layers = list(layers)
    still = [layer.path for layer in layers if layer.scale == 0]
    steep = [layer for layer in layers if abs(layer.scale or 0) > _LARGEST_SCALE]
    wide = [layer for layer in layers if layer.rank and layer.shape and layer.rank > min(layer.shape)]
    doubts = []
    if still:
        doubts.append(f"alpha is 0, so that nothing is changed: {collapsed(still)}")
    if steep:
        scales = listed(sorted({layer.scale for layer in steep if layer.scale}), 4, lambda scale: f"{scale:g}")
        doubts.append(f"a scale (alpha / rank) of {scales} in {collapsed(layer.path for layer in steep)}")
    if wide:
        doubts.append(f"a rank larger than the layer, which is of no use: {collapsed(layer.path for layer in wide)}")
    if len(dtypes) > 1:
        doubts.append(f"tensors of several types: {', '.join(f'{name} ({count:,})' for name, count in dtypes.items())}")
    if base.family and base.said and not base.family.startswith(base.said):
        doubts.append(f"the file says {base.said}, and {base.because}, which is {base.family}")
    return doubts + _contradicted(layers, metadata)


def faults_of(layers: Iterable[Layer]) -> list[str]:
    """What no reader can make sense of: ranks that are not the config's."""
    wrong: dict[tuple[int | None, int | None], list[str]] = {}
    for layer in layers:
        if layer.rank != layer.said:
            wrong.setdefault((layer.said, layer.rank), []).append(layer.path)
    return [
        f"the config says r={said}, and the tensors have rank {r}: {collapsed(own)}" for (said, r), own in wrong.items()
    ]


def _contradicted(layers: list[Layer], metadata: Mapping[str, str]) -> list[str]:
    """What kohya's metadata says of rank and alpha, where no tensor has it."""
    found = []
    for key, name, there in (
        ("ss_network_dim", "rank", Counter(layer.rank for layer in layers if layer.rank is not None)),
        ("ss_network_alpha", "alpha", Counter(layer.alpha for layer in layers if layer.alpha is not None)),
    ):
        said = _number(metadata.get(key))
        if said is not None and there and said not in there:
            has = listed((value for value, _ in there.most_common()), 4, lambda value: f"{value:g}")
            found.append(f"the metadata says {key}={shown(metadata[key])}, and the tensors have {name} {has}")
    return found


def _number(said: str | None) -> float | None:
    try:
        return float(said) if said is not None else None
    except ValueError:
        return None  # "Dynamic", after resizing
