"""An adapter apart from any model: what it does to each layer, and back."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, collapsed, listed
from veneer.core.methods import maker
from veneer.core.methods.beside import Copy, Tokens
from veneer.core.search import Search
from veneer.core.update import Update, flat

WRAPPED = ".base_layer"  # what follows a layer's path in a file where it is adapted in several parts


@dataclass(frozen=True)
class Change:
    """What an adapter does to one layer: ΔW `(out, in · kernel)`, and perhaps Δb.

    `config` is this layer's own (method, `r`, `lora_alpha`, `use_rslora`, `use_dora`, options); no other field says
    anything. `tensors` are by the method's own parameter names and in the shapes of PEFT's files: a convolution's A is
    `(r, in, *kernel)` and its B `(out, r, 1, 1)`; of what flattens to the method's shapes all is read. `shared` is
    what all layers of the adapter have in common (VeRA's projections).
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int] | None:
        """That of ΔW, or None where the tensors do not say it ((IA)³, VeRA)."""
        return self.config.method.sides(self.tensors)

    @property
    def reads_weight(self) -> bool:
        """Whether ΔW depends on more of W than its size."""
        return self.config.use_dora or self.config.method.reads_weight

    def update(self, weight: Tensor | None = None) -> Update:
        """The change as the method has it, with these tensors, in fp32 at least.

        Its `factors()` are (A, B, scale) or None, its `delta(weight)` is ΔW, for which `weight` may be on "meta" unless
        `reads_weight`. The layer's weight `(out, in · kernel)` is to be given where `shape` is None. Raises
        `AdapterError` when that is missing, or the tensors are not those of such a change.
        """
        if (shape := self.shape if weight is None else tuple(weight.shape)) is None:
            raise AdapterError(f"the tensors of {self.config.peft_type} do not say the layer's size: give its weight")
        if self.config.method.share and not self.shared:
            raise AdapterError(
                f"the projections of {self.config.peft_type} are not in the file, but drawn for all layers of a model "
                "at once: put the adapter on its model"
            )
        update = self._on_meta(shape)
        update.requires_grad_(False).materialise(next(iter(self.tensors.values())).device)
        with torch.no_grad():
            for name, value in update.tensors().items():
                value.copy_(self.tensors[name].reshape(value.shape))
            for name, value in update.shared_tensors().items():  # of the widest layers'
                value.copy_(self.shared[name][tuple(map(slice, value.shape))])
        return update

    def check(self) -> None:
        """Raises `AdapterError` when the tensors are not those of such a change, as far as their shapes say it."""
        method, own = self.config.method, self.tensors
        if (shape := self.shape) is not None:
            self._on_meta(shape)
        elif own.keys() != {"b"} and ("sides" in vars(method) or {"A", "B"} <= {*method.forms.values()}):
            raise AdapterError(f"{listed(own, say=str)} alone are no {self.config.peft_type}")

    def _on_meta(self, shape: tuple[int, ...]) -> Update:
        wide = any(tensor.dtype == torch.float64 for tensor in self.tensors.values())
        sketch = torch.empty(shape, device="meta", dtype=torch.float64 if wide else torch.float32)
        update = maker(self.config, [(sketch, self.config)])(sketch, self.config, lambda *_: None)
        update.fit(self.tensors, biased=shape == (self.shape or shape))
        own = update.tensors()
        if own.keys() != self.tensors.keys() or not all(_is(own[name], it) for name, it in self.tensors.items()):
            expected, found = (
                ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
                for tensors in (own, self.tensors)
            )
            raise AdapterError(
                f"a {self.config.peft_type} of rank {self.config.r} for a weight {tuple(shape)} has {expected}, "
                f"found {found}"
            )
        return update


def checked(every: Mapping[str, Change]) -> None:
    """Raises one `AdapterError` that says of which layers the tensors are not those of the config."""
    wrong = defaultdict[str, list[str]](list)
    for path, change in every.items():
        try:
            change.check()
        except AdapterError as error:
            wrong[str(error)].append(path)
    if wrong:
        raise AdapterError(listed((f"{collapsed(paths, 8)}: {said}" for said, paths in wrong.items()), 8, str, "\n"))


def changes(adapter: Adapter) -> dict[str, Change]:
    """What the adapter's method does to each layer, by path. What it trains `beside` is none of this.

    Raises `AdapterError` for patterns that name no layer.
    """
    rest = beside(adapter)
    paths = [path for path in adapter.tensors if path and path not in rest]
    own, shared = own_configs(adapter.config, paths), adapter.tensors.get("", {})
    return {path: Change(own[path], dict(adapter.tensors[path]), shared) for path in paths}


def own_configs(config: LoraConfig, paths: Iterable[str]) -> dict[str, LoraConfig]:
    """The config of each layer for itself, with no more in it than says what its tensors do; the layers' paths are
    those of a file. Raises `AdapterError` for patterns that match none.
    """
    layers = {path: path.partition(WRAPPED)[0] for path in paths}
    config = config.method.saved_config(config)
    search = _search(layers.values())
    own = search.own_fields([(path, "") for path in search.modules], config)
    search.stop()
    names = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "options")
    plain = LoraConfig(**{name: getattr(config, name) for name in names})
    found = {path: copy(plain) for path in search.modules}
    for path, one in found.items():
        vars(one).update(own.get((path, ""), {}))  # checked before, for all layers at once
    return {path: found[layer] for path, layer in layers.items()}


def _search(paths: Iterable[str]) -> Search:
    """A search among layers of which only the paths are known."""
    return Search(dict.fromkeys(paths, nn.Linear(1, 1, device="meta")))


def beside(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """What the adapter trains that is no change of a layer by its method: modules and biases whole (`{"value": W′}`
    under the parameter's path), rows of tables (`{"rows": R}`), and what `target_parameters` names, whose tensors do
    not say of how many matrices they are.
    """
    whole = {*Copy.file_names, *Tokens.file_names}
    rest = {path: own for path, own in adapter.tensors.items() if path and own.keys() <= whole}
    if adapter.config.target_parameters:
        paths = [path for path in adapter.tensors if path and path not in rest]
        names = adapter.config.target_modules
        layers = _search(paths).matching(names, "target_modules", paths) if names else []
        rest |= {path: adapter.tensors[path] for path in paths if path not in layers}
    return rest


def adapter_of(
    changes: Mapping[str, Change],
    *,
    like: Adapter | None = None,
    metadata: Mapping[str, str] | None = None,
    parts: Iterable[str] = (),
    embeddings: Iterable[str] = (),
    base: str | None = None,
    task_type: str | None = None,
) -> Adapter:
    """The adapter that makes these changes, by path: its one config says all layers.

    The method, `r` and `lora_alpha` are the commonest; `method_pattern`, `rank_pattern` and `alpha_pattern` hold the
    others under escaped whole paths. With `like`, what that adapter trains `beside` and all that it says of itself is
    kept, and its config as it is where it says the same. Raises `AdapterError` when one adapter cannot say it.
    """
    rest = beside(like) if like else {}
    if not changes and not rest:
        raise AdapterError("an adapter changes at least one layer")
    old = like or Adapter(LoraConfig(base_model_name_or_path=base, task_type=task_type), {})
    own = {path: change.config for path, change in changes.items()}
    layers = dict[str, LoraConfig]()
    for path, config in own.items():
        if layers.setdefault(path.partition(WRAPPED)[0], config) != config:
            raise AdapterError(f"{path}: the parts of one layer have one config")
    if like and own == own_configs(like.config, [path for path in like.tensors if path and path not in rest]):
        config = like.config.method.saved_config(like.config)
    else:
        config = _spelt(layers, old.config)
    tensors = {path: dict(change.tensors) for path, change in changes.items()} | rest
    shared: dict[str, Tensor] = {}
    for change in changes.values():
        for name, tensor in change.shared.items():
            if shared.setdefault(name, tensor) is not tensor and not torch.equal(shared[name], tensor):
                raise AdapterError(
                    f"the layers share several {change.config.peft_type} projections {name}: one is wanted"
                )
    return Adapter(
        config,
        tensors | ({"": shared} if shared else {}),
        frozenset(embeddings) or frozenset(old.embeddings & tensors.keys()),
        {path: table for path, table in old.bases.items() if path in tensors},
        {**old.metadata, **(metadata or {})},
        tuple(parts) or old.parts,
    )


def _spelt(layers: Mapping[str, LoraConfig], old: LoraConfig) -> LoraConfig:
    """The one config that says those of the layers; what it says of other things is `old`'s."""
    groups = defaultdict[str, dict[str, LoraConfig]](dict)
    for path, own in layers.items():
        options = {name: value for name, value in own.options.items() if name not in own.method.naming}
        groups[repr((own.peft_type, own.use_dora, own.use_rslora, options))][path] = own
    first, *others = sorted(groups.values(), key=len, reverse=True) or [{"": old}]
    most, numbers = _method(first, {}), dict[str, Any]()
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        found = {path: getattr(own, name) for path, own in layers.items()}
        if not old.target_parameters:  # whose numbers these are too
            ((numbers[name], _),) = Counter(found.values()).most_common(1) or [(getattr(old, name), 0)]
        apart = {_exact(path): value for path, value in found.items() if value != numbers.get(name)}
        numbers[pattern] = apart | (getattr(old, pattern) if old.target_parameters else {})
    return replace(
        old,
        **most,
        method_pattern={_exact(path): _method({path: own}, most) for group in others for path, own in group.items()},
        **numbers,
        target_modules=list(layers),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        init_lora_weights=True,
    )


def _method(layers: Mapping[str, LoraConfig], most: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that gives these layers their one method, where `most` layers have those."""
    own = next(iter(layers.values()))
    named = {name: [path for path, each in layers.items() if each.options[name]] for name in own.method.naming}
    fields = {name: getattr(own, name) for name in ("peft_type", "use_dora", "use_rslora")}
    usual = {name: option.default for name, option in own.method.options.items()}
    usual |= most["options"] if most and most["peft_type"] == own.peft_type else {}
    said = {name: value for name, value in {**own.options, **named}.items() if value != usual[name]}
    return {**fields, "options": said}


def _is(wanted: Tensor, found: Tensor) -> bool:
    """Whether what a file holds has the shape, but for ones, or flattens to it."""
    bare = [[size for size in tensor.shape if size != 1] for tensor in (wanted, found)]
    return bare[0] == bare[1] or wanted.shape == flat(found)


def _exact(path: str) -> str:
    """The pattern for this one layer."""
    return "^" + re.escape(path).replace(r"\-", "-")
