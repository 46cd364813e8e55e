"""The adapter between two whole models: their difference, layer by layer, as a LoRA."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from veneer.apart.changes import Change, adapter_of
from veneer.combine.base import Source
from veneer.combine.combined import Progress
from veneer.combine.layers import Errors
from veneer.combine.matrix import Keep
from veneer.combine.stored import StoredWeights, weights_of
from veneer.combine.together import told
from veneer.combine.ways import stored
from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed, named
from veneer.safe.stored import is_finite

# tables, whose rows are looked up: transformers' and diffusers' names for them
_TABLE = re.compile(
    r"(^|\.)(\w*embed(ding)?s?(_tokens|_in|_positions)?|wte|wpe|shared|relative_attention_bias)\.weight"
)


@dataclass
class Extracted:
    """The adapter, its error, and what of the two models is not in it."""

    adapter: Adapter
    errors: Errors
    same: list[str] = field(default_factory=list)  # parameters without a difference
    left: list[str] = field(default_factory=list)  # norms, biases and tables that differ
    strange: list[str] = field(default_factory=list)  # in one of the two models alone, or of other shapes


@torch.no_grad()
def extract(
    tuned: Source,
    base: Source,
    rank: int | None = None,
    *,
    energy: float | None = None,
    ratio: float | None = None,
    conv_rank: int | None = None,
    everything: bool = False,
    dtype: torch.dtype = torch.float32,
    rename: Callable[[str], str | None] = lambda name: name,
    parts: Sequence[str] = (),
    base_name: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Extracted:
    """ΔW = W_tuned - W_base as the best LoRA of that `rank`, `energy` or `ratio` (`veneer.combine.matrix.Keep`).

    Both are models, tensors by name, folders (in pieces, or of a pipeline's parts) or safetensors files; of files one
    layer at a time is in memory. Adapted are the matrices and kernels that differ; `conv_rank` is for kernels of more
    than a point. What else differs (norms, biases, tables) is told, and with `everything` kept whole. A difference that
    is none but by the rounding of one of the two files is none. `rename` gives a parameter its name in the adapter, or
    None where it has no place there; `parts` are the first words of such names that are a pipeline's parts.

    Factors are not clamped, which kohya's script offers: the best approximation of a rank is lost by that.
    Raises `AdapterError` when there is nothing to extract.
    """
    keep = Keep(rank=rank, energy=energy, ratio=ratio)
    if keep.everything:
        raise AdapterError("extract: say which rank, energy or ratio the LoRA should have")
    pair = _Pair(_weights(tuned), _weights(base))
    found = Extracted(Adapter(LoraConfig(), {}), Errors(), strange=pair.strange)
    changes, tables = _changes(pair, keep, conv_rank, everything, dtype, rename, progress, found)
    if not changes:
        more = f"; what differs are {listed(found.left, say=named)}" if found.left else ""
        more += f"; in one of them alone are {listed(found.strange, say=named)}" if found.strange else ""
        raise AdapterError(f"the two models have the same matrices: there is nothing to extract{more}")
    first = {path.partition(".")[0] for path in changes}
    own = [part for part in (*parts, *pair.parts) if part in first]
    if alone := [path for path in tables if pair.may_be_tied(path)]:
        warnings.warn(
            f"where another layer shares the weight of {listed(alone, say=named)} (a tied head), it is not changed "
            "with it by this adapter",
            stacklevel=3,
        )
    found.adapter = adapter_of(changes, parts=own, embeddings=tables, base=base_name)
    return found


def _changes(
    pair: "_Pair",
    keep: Keep,
    conv_rank: int | None,
    everything: bool,
    dtype: torch.dtype,
    rename: Callable[[str], str | None],
    progress: Progress,
    found: Extracted,
) -> tuple[dict[str, Change], list[str]]:
    """What each layer is changed by, and which of them are tables; all else is told to `found`."""
    changes, rest, faults = dict[str, Change](), dict[str, Tensor](), list[str]()
    for done, name in enumerate(pair.names):
        progress(done, len(pair.names))
        D, own = pair.difference(name), rename(name)
        if D is None:
            (found.same if pair.is_same(name) else found.left).append(name)
        elif own is None:
            found.left.append(name)
        elif not is_finite(D):
            faults.append(f"{name}: NaN or infinity in the difference")
        elif pair.is_matrix(name):
            path, row = own.removesuffix(".weight"), tuple(D.shape[1:])
            is_kernel = row[1:].count(1) < len(row[1:])
            way = replace(keep, rank=conv_rank) if is_kernel and conv_rank is not None else keep
            changes[path], found.errors.squares[path] = stored(D.flatten(1), None, row, way, dtype)
        elif everything and own.endswith((".weight", ".bias")):
            rest[own] = D
        else:
            found.left.append(name)
    progress(len(pair.names), len(pair.names))
    if faults:
        raise AdapterError(told(faults))
    for own, D in rest.items():
        path, _, kind = own.rpartition(".")
        changes[path] = _whole(changes.get(path), kind, D, dtype)
    return changes, [own.removesuffix(".weight") for own in rest if _TABLE.search(own)]


class _Pair:
    """The parameters of two models of one shape."""

    def __init__(self, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
        """Raises `AdapterError` when they have none in common."""
        self.new, self.old = new, old
        shapes = {name: (_shape(old, name), _shape(new, name)) for name in old if name in new}
        self.names = [name for name, (its, other) in shapes.items() if its == other]
        self.strange = list(dict.fromkeys(name for name in (*old, *new) if name not in set(self.names)))
        self.shapes = {name: shapes[name][0] for name in self.names}
        self.parts: tuple[str, ...] = getattr(old, "parts", ())
        # whether its layers hold their weights as (in, out), as GPT-2's do: the biases, of size out, say it
        biases = {name: self.shapes.get(f"{name.removesuffix('weight')}bias") for name in self.names}
        turned = [name for name, W in self.shapes.items() if len(W) == 2 and biases[name] == W[1:]]
        self.turned = {*turned} if any(self.shapes[name][:1] != biases[name] for name in turned) else set()
        if not self.names:
            examples = f"{listed(new, 3)} and {listed(old, 3)}, for example"
            raise AdapterError(f"the models have no parameter of one shape in common: {examples}")

    def is_matrix(self, name: str) -> bool:
        """Whether it is what a LoRA is for."""
        return name.endswith(".weight") and len(self.shapes[name]) >= 2 and not self.is_table(name)

    def may_be_tied(self, path: str) -> bool:
        """Whether it is the largest table, and no layer has a matrix of its size, as an output head of its own has."""
        shape = self.shapes.get(f"{path}.weight")
        tables = [own for name, own in self.shapes.items() if self.is_table(name)]
        return shape == max(tables) and all(own != shape or self.is_table(name) for name, own in self.shapes.items())

    def is_table(self, name: str) -> bool:
        return len(self.shapes[name]) == 2 and _TABLE.search(name) is not None

    def is_same(self, name: str) -> bool:
        """Whether nothing differs there, or only what one of the two files rounded."""
        new, old = self.new[name], self.old[name]
        return (new.is_floating_point() and old.is_floating_point()) or torch.equal(new, old)

    def difference(self, name: str) -> Tensor | None:
        """ΔW, a row for each output, or None where there is none, at the coarser precision of the two."""
        new, old = self.new[name].detach(), self.old[name].detach()
        if not new.is_floating_point() or not old.is_floating_point():
            return None
        coarser = new.dtype if torch.finfo(new.dtype).eps > torch.finfo(old.dtype).eps else old.dtype
        if torch.equal(new.to(coarser), old.to(coarser)):
            return None
        wide = torch.float64 if torch.float64 in (new.dtype, old.dtype) else torch.float32
        D = new.to(wide) - old.to(wide)
        return D.t() if D.ndim == 2 and (name in self.turned or self.is_table(name)) else D


def _weights(source: Source) -> Mapping[str, Tensor]:
    if isinstance(source, nn.Module):
        return dict(source.named_parameters())
    return source if isinstance(source, Mapping) else weights_of(source)


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return weights.shape(name) if isinstance(weights, StoredWeights) else tuple(weights[name].shape)


def _whole(change: Change | None, kind: str, D: Tensor, dtype: torch.dtype) -> Change:
    """A difference kept as it is, beside what the layer has already."""
    tensors = dict(change.tensors) if change else {}
    tensors["b" if kind == "bias" else "D"] = D.to(dtype).contiguous()
    if change is not None and change.config.peft_type == "LORA":
        return Change(replace(change.config, options={**change.config.options, "lora_bias": True}), tensors)
    return Change(LoraConfig(peft_type="FULL"), tensors)
