"""`PeftModel`: the model itself, once it carries adapters."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed
from veneer.core.inject import adapted_layers, detach, extract, inject, settle
from veneer.core.kinds.layer import AdaptedLayer
from veneer.core.merge import merge, unmerge
from veneer.core.plan import Plan, Rows, Spec, terms_by_row, terms_of
from veneer.core.reclass import Reclassed, is_fixed, reclass, refuse_changed, restore
from veneer.core.trainer import Trainable, watching

Folder = str | os.PathLike[str]


class PeftModel(Trainable):
    """A model with adapters: `isinstance(model, type_of_the_base)` stays true, and so do its paths and keys.

    One `Plan` says which adapters act; switching sets one attribute of it, whatever the model's size. Nothing
    here touches `requires_grad` but what freezes the base once: `get_peft_model` and `from_pretrained`.
    """

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: Folder,
        adapter_name: str = "default",
        is_trainable: bool = False,
        low_cpu_mem_usage: bool = True,
    ) -> "PeftModel":
        """Put the adapter of a PEFT folder on `model`, freeze the base, and let the adapter act.

        `low_cpu_mem_usage`, which PEFT has, says nothing here: adapters are read straight into their place, and draw
        no random numbers. Raises `AdapterError` that lists all that does not fit; the model is then as it was.
        """
        return _first_adapter(model, adapter_name, Adapter.examined(folder), is_trainable)

    def load_adapter(
        self, folder: Folder, adapter_name: str, is_trainable: bool = False, low_cpu_mem_usage: bool = True
    ) -> None:
        """Read a PEFT folder into a new adapter. It does not act until `set_adapter`, and changes no other."""
        self._add(adapter_name, Adapter.examined(folder), is_trainable)

    def get_adapter(self, name: str | None = None) -> Adapter:
        """The adapter as plain data; its tensors are the live ones, until rows are mixed."""
        if name is None:
            names = list(self.peft_config) if len(self.peft_config) == 1 else self.active_adapters
            if len(names) != 1:
                raise AdapterError(f"which adapter? the model carries {listed(self.peft_config)}: give adapter_name")
            name = names[0]
        return extract(self, name, self._config(name))

    def add_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        """Give the layers that `config` means a fresh, trainable update. It does not act until `set_adapter`."""
        self._add(adapter_name, config, True)

    def set_adapter(self, adapters: Spec) -> None:
        """Let these adapters act: a name, a list of names (their sum), or `{name: weight}` (a blend)."""
        terms = terms_of(adapters, self.peft_config)
        self.adapter_plan.refuse_merged("switching adapters")
        self.adapter_plan.act(terms)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        **options: Any,
    ) -> None:
        """Combine adapters into a new one, which does not act until `set_adapter`: "linear" is the exact weighted sum,
        and PEFT's other types act on the true changes. `veneer.combine.live.add_weighted` has the options.
        """
        from veneer.combine.live import add_weighted

        add_weighted(self, adapters, weights, adapter_name, combination_type, **options)

    @property
    def modules_to_save(self) -> set[str]:
        """The names of the modules that adapters train whole."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or []}

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the model. If it acted, the others of its blend act on; without any, the base does."""
        self._config(adapter_name)
        self.adapter_plan.refuse_merged("deleting an adapter")
        for _, layer in list(adapted_layers(self)):
            detach(layer, adapter_name)
        del self.peft_config[adapter_name]
        settle(self)
        self.adapter_plan.forget(adapter_name)

    @contextmanager
    def using(self, adapters: Spec) -> Iterator[None]:
        """`with model.using("fr"):` these adapters act inside, and what acted before acts after, also on an error."""
        terms = terms_of(adapters, self.peft_config)
        merged = self.adapter_plan.merged
        unmerge(self, self.adapter_plan)
        before = self.adapter_plan.terms
        self.adapter_plan.act(terms)
        try:
            yield
        finally:
            unmerge(self, self.adapter_plan)
            self.adapter_plan.act(self.adapter_plan.carried(before))
            if merged := self.adapter_plan.carried(merged):
                merge(self, self.adapter_plan, merged)

    def __call__(self, *inputs: Any, adapter_names: Rows | None = None, **more: Any) -> Any:
        """The model's own call; `adapter_names` says for each row of the batch which adapter acts on it.

        An entry is a name, a blend `{name: weight}`, or `"__base__"`; base rows are those of the base model, bit for
        bit. Rows are the first dimension of what the layers see. Raises `AdapterError` where a layer cannot be mixed.
        """
        plan = self.adapter_plan
        if hasattr(self, "_hf_hook"):  # accelerate's
            plan.refuse_offloaded()
        eager = self.training and not torch.compiler.is_compiling()
        first = eager and any(term.adapter not in plan.watched for term in plan.terms)
        again = eager and torch.is_grad_enabled() and self._recomputes()
        if adapter_names is None and not first and not again:
            return super().__call__(*inputs, **more)
        with ExitStack() as around:
            if adapter_names is not None:
                around.enter_context(self._mixed(adapter_names))
            if first:
                around.enter_context(watching(self, plan))
            if again:
                around.enter_context(plan.recomputing())
            return super().__call__(*inputs, **more)

    @contextmanager
    def _mixed(self, adapter_names: Rows, repeats: bool = False) -> Iterator[None]:
        terms = terms_by_row(adapter_names, self.peft_config)
        self.adapter_plan.refuse_merged("mixing rows")
        unmixable = self.adapter_plan.unmixable
        if stuck := [unmixable[term.adapter] for term in terms if term.adapter in unmixable]:
            raise AdapterError(f"{stuck[0]} does not see the rows of the batch: adapters on it cannot be mixed")
        if any(term.rows for term in self.adapter_plan.terms):
            raise AdapterError("another call with adapter_names is under way on this model: one at a time")
        if self.training and torch.is_grad_enabled() and self._recomputes():
            raise AdapterError("mixed rows cannot be trained with gradient checkpointing: it runs layers again later")
        before = self.adapter_plan.terms
        self.adapter_plan.act(terms)
        self.adapter_plan.repeats = repeats
        try:
            yield
        finally:
            self.adapter_plan.act(before)
            self.adapter_plan.repeats = False

    def _recomputes(self) -> bool:
        plan = self.adapter_plan
        if plan.checkpointed is None:
            plan.checkpointed = [module for module in self.modules() if hasattr(module, "gradient_checkpointing")]
        return any(module.gradient_checkpointing for module in plan.checkpointed)

    def disable_adapter(self) -> Any:
        """`with model.disable_adapter():` the base model acts inside, to the bit. `requires_grad` is not touched."""
        return self.using([])

    def merge_adapter(self, adapter_names: Spec | None = None) -> None:
        """W ← W + Σ ΔW of these adapters (those that act, if not given): whole, or nothing is changed."""
        self._merge(adapter_names, untie=False)

    def _merge(self, adapter_names: Spec | None, untie: bool) -> None:
        self.adapter_plan.refuse_merged("merging")
        terms = self.adapter_plan.terms if adapter_names is None else terms_of(adapter_names, self.peft_config)
        if not terms:
            raise AdapterError(f"no adapter acts: name some to merge of {listed(self.peft_config)}")
        merge(self, self.adapter_plan, terms, untie)

    def unmerge_adapter(self) -> None:
        """The base's weights again, bit for bit; what acted before the merge acts again, live."""
        if not self.adapter_plan.merged:
            raise AdapterError("nothing is merged")
        unmerge(self, self.adapter_plan)

    def merge_and_unload(self, adapter_names: Spec | None = None, untie: bool = False) -> nn.Module:
        """The plain base model with these adapters inside its weights; its parameters stay frozen.

        With `untie`, a changed layer whose weight others share, and that only it should change, gets one of its own.
        """
        if not self.adapter_plan.merged or adapter_names is not None:
            self._merge(adapter_names, untie)
        return self._strip()

    def unload(self) -> nn.Module:
        """The plain base model as it was, bit for bit, without adapters; its parameters stay frozen."""
        unmerge(self, self.adapter_plan)
        return self._strip()

    def hotswap_adapter(self, folder: Folder, adapter_name: str = "default") -> None:
        """Read a PEFT folder into a live adapter of the same layers: only the values of its tensors change.

        Raises `AdapterError`, with nothing changed, when it holds a larger rank, other layers or another method.
        """
        from veneer.files.live import hotswap

        self._config(adapter_name)
        self.adapter_plan.refuse_merged("a hot swap")
        hotswap(self, adapter_name, Adapter.examined(folder))

    def _add(self, name: str, what: LoraConfig | Adapter, is_trainable: bool) -> None:
        if name in self.peft_config:
            raise AdapterError(f"the model already carries an adapter named {name!r}; delete it or take another name")
        self.adapter_plan.refuse_merged("adding an adapter")
        resolved = inject(self, self.adapter_plan, name, what)
        if not is_trainable:
            for update in self.adapter_plan.updates[name].values():
                update.requires_grad_(False)
        resolved.base_model_name_or_path = resolved.base_model_name_or_path or getattr(self, "name_or_path", None)
        self.peft_config[name] = resolved

    def _config(self, name: str) -> LoraConfig:
        terms_of([name], self.peft_config)
        return self.peft_config[name]

    def _strip(self) -> nn.Module:
        modules = list(self.modules())
        for module in modules:
            if isinstance(module, Reclassed):
                refuse_changed(module)
        for module in modules:
            if isinstance(module, AdaptedLayer):
                detach(module)
        settle(self)
        del self.adapter_plan, self.peft_config
        restore(self)
        return self


class GeneratingPeftModel(PeftModel):
    """A `PeftModel` whose base can generate."""

    def generate(self, *inputs: Any, adapter_names: Rows | None = None, **more: Any) -> Any:
        """The base's own `generate`, beams included; `adapter_names` as in a call."""
        with nullcontext() if adapter_names is None else self._mixed(adapter_names, repeats=True):
            return super().generate(*inputs, **more)  # type: ignore[misc]


def get_peft_model(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> PeftModel:
    """Adapt `model` in place: freeze its parameters, give the layers that `config` means a trainable update.

    The returned object is `model` itself, which now is a `PeftModel` too. Raises `AdapterError`, with the model
    as it was, when a target matches nothing or cannot be adapted.
    """
    return _first_adapter(model, adapter_name, config, True)


def _first_adapter(model: nn.Module, name: str, what: LoraConfig | Adapter, is_trainable: bool) -> PeftModel:
    if isinstance(model, PeftModel):
        raise AdapterError("the model already carries adapters: use add_adapter or load_adapter")
    if taken := _taken(model):
        raise AdapterError(f"{type(model).__name__} already has something named {listed(taken)}, as a PeftModel has")
    if inner := next(adapted_layers(model), None):
        raise AdapterError(f"{inner[0]} carries adapters already, of a part of this model: unload that part first")
    if is_fixed(model):
        kind = type(model).__name__
        raise AdapterError(f"{kind} inherits from something else before nn.Module: adapt the model before fully_shard")
    base = list(model.parameters())
    reclass(model, GeneratingPeftModel if hasattr(model, "generate") else PeftModel)
    assert isinstance(model, PeftModel)
    model.adapter_plan, model.peft_config = Plan(), {}
    try:
        model._add(name, what, is_trainable)
    except BaseException:
        model._strip()
        raise
    for parameter in base:
        parameter.requires_grad_(False)
    model.set_adapter(name)
    return model


def _taken(model: nn.Module) -> list[str]:
    """The names on the object itself (its submodules, say) that a `PeftModel`'s own would hide."""
    own = set(dir(PeftModel)) - set(dir(nn.Module))
    held = {*vars(model), *model._modules, *model._parameters, *model._buffers}
    return sorted(own & held | {word for word in ("adapter_plan", "peft_config") if hasattr(model, word)})
