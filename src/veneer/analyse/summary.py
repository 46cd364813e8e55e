"""`summary`: what an adapter is, in plain values."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from veneer.analyse.doubts import doubts_of, faults_of
from veneer.analyse.family import Base, base_of
from veneer.analyse.layers import BIAS, ROWS, WHOLE, Layer, layers_of
from veneer.analyse.roles import ROLES
from veneer.analyse.values import Values, values_of
from veneer.analyse.words import facts_of, trigger_words_of
from veneer.core.adapter import Adapter

_MOST = 5  # of the largest changes


@dataclass(frozen=True)
class Summary:
    """What an adapter is. Counts are of layers, unless they say otherwise."""

    format: str | None
    base: Base
    layers: dict[str, Layer]
    bytes: int
    dtypes: dict[str, int]  # type → numbers of it
    trigger_words: dict[str, int | None]  # with how often a tag stood in the captions
    facts: dict[str, str]  # what the file says of itself, under plain names
    metadata: dict[str, str]  # all that it says
    values: Values | None  # None where no value was read
    doubts: tuple[str, ...]  # what is suspicious
    faults: tuple[str, ...]  # what makes the file unfit for use

    @property
    def parameters(self) -> int:
        """How many numbers the adapter holds."""
        return sum(self.dtypes.values())

    def counts(self, field: str, among: Iterable[Layer] | None = None) -> dict[Any, int]:
        """A field of `Layer` → how many layers have it so, the commonest first; those without it left out."""
        values = (getattr(layer, field) for layer in (self.layers.values() if among is None else among))
        return dict(Counter(value for value in values if value is not None).most_common())

    @property
    def roles(self) -> list[str]:
        """Those that there are, in the order of a transformer."""
        there = self.counts("role")
        return [role for role in ROLES if role in there]

    def with_role(self, role: str) -> list[Layer]:
        """The layers of a role."""
        return [layer for layer in self.layers.values() if layer.role == role]

    def saved(self, how: str) -> list[str]:
        """The paths of what is trained beside the method, `WHOLE`, `BIAS` or `ROWS`."""
        return [path for path, layer in self.layers.items() if layer.method == how]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: everything here, with counts by role, and norms where values were read."""
        told = {name: _histogram(self.counts(name)) for name in ("method", "part", "rank", "alpha", "scale")}
        return {
            "format": self.format,
            "base": asdict(self.base),
            "methods": told["method"],
            "parts": {name: count for name, count in told["part"].items() if name},
            "ranks": told["rank"],
            "alphas": told["alpha"],
            "scales": told["scale"],
            "roles": {role: self._role(role) for role in self.roles},
            "parameters": self.parameters,
            "bytes": self.bytes,
            "dtypes": self.dtypes,
            "saved_whole": self.saved(WHOLE),
            "biases": self.saved(BIAS),
            "token_rows": self.saved(ROWS),
            "trigger_words": self.trigger_words,
            "facts": self.facts,
            "values": self._values(),
            "doubts": list(self.doubts),
            "faults": list(self.faults),
            "layers": {path: self._layer(layer) for path, layer in self.layers.items()},
            "metadata": self.metadata,
        }

    def _role(self, role: str) -> dict[str, Any]:
        own = self.with_role(role)
        told = {"layers": len(own), "ranks": _histogram(self.counts("rank", own))}
        told["parts"] = {part: count for part, count in self.counts("part", own).items() if part}
        return told | ({"norm": self.values.among(layer.path for layer in own)} if self.values else {})

    def _layer(self, layer: Layer) -> dict[str, Any]:
        told = asdict(layer)
        del told["path"], told["said"]
        told["shape"] = layer.shape and list(layer.shape)
        return told | ({"norm": self.values.norms.get(layer.path)} if self.values else {})

    def _values(self) -> dict[str, Any] | None:
        if self.values is None:
            return None
        norms = self.values.norms
        return {
            "norm": self.values.among(norms),
            "largest": {path: norms[path] for path in self.values.largest(_MOST)},
            "dead": list(self.values.dead),
        }


def summary(adapter: Adapter, format: str | None = None, values: bool = True) -> Summary:
    """What `adapter` is; `format` is the file's, if it is from one. Without `values` only shapes and words are read.

    Raises `AdapterError` where the config does not fit the tensors.
    """
    layers, changes = layers_of(adapter)
    numbers: Counter[str] = Counter()
    for tensor in (tensor for own in adapter.tensors.values() for tensor in own.values()):
        numbers[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    dtypes = dict(numbers.most_common())
    sizes = {path: layer.shape for path, layer in layers.items()}
    base = base_of(sizes, adapter.parts, adapter.config.base_model_name_or_path, adapter.metadata)
    found = values_of(adapter, changes) if values else None
    doubts = doubts_of(layers.values(), dtypes, base, adapter.metadata) + list(found.doubts if found else ())
    faults = [*adapter.faults, *faults_of(layers.values()), *(found.faults if found else ())]
    return Summary(
        format=format,
        base=base,
        layers=layers,
        bytes=size_of(adapter),
        dtypes=dtypes,
        trigger_words=trigger_words_of(adapter.metadata),
        facts=facts_of(adapter.metadata),
        metadata=dict(adapter.metadata),
        values=found,
        doubts=tuple(doubts),
        faults=tuple(faults),
    )


def size_of(adapter: Adapter) -> int:
    """The bytes of all tensors."""
    return sum(tensor.nbytes for own in adapter.tensors.values() for tensor in own.values())


def _histogram(counts: Mapping[Any, int]) -> dict[str, int]:
    """With keys that JSON has."""
    return {f"{key:g}" if isinstance(key, float) else str(key): count for key, count in counts.items()}
