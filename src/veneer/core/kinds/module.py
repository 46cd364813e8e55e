"""Any module, with values of its own for the parameters in it: `modules_to_save`, and biases by themselves."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from veneer.core.config import LoraConfig
from veneer.core.errors import listed
from veneer.core.kinds.dense import AdaptedParts
from veneer.core.update import Make


class AdaptedModule(AdaptedParts):
    """y = f(x; W + Σ weight · (W′ - W)) for parameters W of a module of any class, those of modules in it included.

    One adapter with weight 1 gives y = f(x; W′), to the bit.
    """

    @classmethod
    def refusal(cls, layer: nn.Module, config: LoraConfig) -> str | None:
        parameters = dict(layer.named_parameters(remove_duplicate=False))
        if buffers := [name for name in layer.state_dict() if name not in parameters]:
            return f"with buffers, which training changes and no adapter holds: {listed(buffers)}"
        if quantised := [name for name, own in parameters.items() if not own.is_floating_point()]:
            return f"with quantised parameters, which cannot be trained: {listed(quantised)}"
        if type(layer).forward is nn.Module.forward:
            return "that is never called itself: name the modules in it"
        return None if parameters else "without parameters"

    @classmethod
    def names(cls, layer: nn.Module) -> dict[str, str]:
        names = (name for name, _ in layer.named_parameters() if not name.startswith("adapters."))
        return {name.replace(".", "/"): name for name in names}  # modules are not named with dots

    @classmethod
    def matrices(cls, layer: nn.Module) -> dict[str, Tensor]:
        return {part: attrgetter(name)(layer) for part, name in cls.names(layer).items()}

    @classmethod
    def part(cls, make: Make, value: Tensor, config: LoraConfig) -> Any:
        return make(value, config, cls.start)

    @classmethod
    def values(cls, layer: nn.Module, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {part.replace("/", "."): value for part, value in matrices.items()}

    @classmethod
    def places(cls, update: Any) -> dict[str, str]:
        return {part: "." + part.replace("/", ".") for part in update.parts()}

    def own_forward(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The base class's own forward; it may run all that it holds (`nn.Sequential`), so it does not see adapters."""
        adapters = self._modules.pop("adapters")
        try:
            return super().own_forward(values, *args, **kwargs)
        finally:
            self._modules["adapters"] = adapters
