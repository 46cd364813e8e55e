"""`Carriers`: the parts of a pipeline that carry adapters, with a `PeftModel`'s calls for all of them at once."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from veneer.core.errors import AdapterError, listed
from veneer.core.model import PeftModel
from veneer.core.plan import Spec, terms_of

Weights = Mapping[str, float | Mapping[str, float]]
Asked = Spec | Weights


class Carriers(dict[str, PeftModel]):
    """`{part: model}` of the parts that carry adapters; each can be asked by itself too.

    Weights are those of `PeftModel.set_adapter`, or `{adapter: {part: weight}}` with a weight for every part that
    carries it. A part acts with those that it carries; what has the weight 0 does not act, so that the base's bits are
    had. What cannot be done to one part is done to none.
    """

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapters' configs, each that of the first part that carries it."""
        return {name: own for model in reversed(self._models()) for name, own in model.peft_config.items()}

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that act on any part, live or merged."""
        return list(dict.fromkeys(name for model in self._models() for name in model.active_adapters))

    def set_adapter(self, adapters: Asked) -> None:
        """Let these act: a name, a list of names (their sum), or weights by name (a blend)."""
        wanted = self._by_part(adapters)
        self._refuse_merged("switching adapters")
        for part, own in wanted.items():
            self[part].set_adapter(own)

    @contextmanager
    def using(self, adapters: Asked) -> Iterator[None]:
        """These act inside, and what acted before acts after, on every part, also on an error."""
        with ExitStack() as around:
            for part, own in self._by_part(adapters).items():
                around.enter_context(self[part].using(own))
            yield

    def disable_adapter(self) -> Any:
        """`with carriers.disable_adapter():` the base acts inside, to the bit."""
        return self.using([])

    def merge_adapter(self) -> None:
        """W ← W + Σ weight · ΔW of what acts, on all parts or none: as fast as the base alone.

        Until `unmerge_adapter`, which gives the base's weights back bit for bit, nothing can be switched.
        """
        self._refuse_merged("merging")
        acting = [model for model in self._models() if model.adapter_plan.terms]
        if not acting:
            raise AdapterError(f"no adapter acts: let some of {listed(self.peft_config)} act first")
        with ExitStack() as undoing:
            for model in acting:
                model.merge_adapter()
                undoing.callback(model.unmerge_adapter)
            undoing.pop_all()

    def unmerge_adapter(self) -> None:
        """The base's weights again, bit for bit, on every part."""
        merged = [model for model in self._models() if model.adapter_plan.merged]
        if not merged:
            raise AdapterError("nothing is merged")
        for model in merged:
            model.unmerge_adapter()

    def _models(self) -> list[PeftModel]:
        return [model for model in self.values() if isinstance(model, PeftModel)]

    def _refuse_merged(self, doing: str) -> None:
        for model in self._models():
            model.adapter_plan.refuse_merged(doing)

    def _by_part(self, adapters: Asked) -> dict[str, dict[str, float]]:
        """The weights of what acts on each part. Raises `AdapterError` for names that no part carries."""
        parts = {part: model.peft_config for part, model in self.items() if isinstance(model, PeftModel)}
        mapping = isinstance(adapters, Mapping)
        said: Mapping[str, Any] = adapters if isinstance(adapters, Mapping) else {}
        split = {name: own for name, own in said.items() if isinstance(own, Mapping)}
        plain: Any = {name: own for name, own in said.items() if name not in split} if mapping else adapters
        names = {term.adapter: term.weight for term in terms_of(plain, self.peft_config)}
        for name, own in split.items():
            carrying = [part for part, config in parts.items() if name in config]
            for weight in own.values():
                terms_of({name: weight}, self.peft_config)
            if set(carrying) != set(own):
                raise AdapterError(f"{name!r} is on {listed(carrying)}: expected a weight for each, found {dict(own)}")
        found = {}
        for part, config in parts.items():
            every = {**names, **{name: own.get(part, 0.0) for name, own in split.items()}}
            found[part] = {name: every[name] for name in (said if mapping else names) if every[name] and name in config}
        return found
