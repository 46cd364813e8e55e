"""What training asks of a model: what it carries, what of it trains, and checkpoints that are read back into it."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, collapsed
from veneer.core.inject import adapted_layers, gathered
from veneer.core.plan import Plan
from veneer.core.reclass import Reclassed

if TYPE_CHECKING:
    from veneer.analyse.live import LayerStatus, ModelStatus


class Trainable(Reclassed):
    """The part of a `PeftModel` that is for training, by transformers' Trainer too."""

    adapter_plan: Plan
    peft_config: dict[str, LoraConfig]
    get_adapter: Callable[[str | None], Adapter]
    _hf_peft_config_loaded = True  # asked before a quantised model is trained, and when layers are checkpointed

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that act, live or merged."""
        return [term.adapter for term in self.adapter_plan.terms or self.adapter_plan.merged]

    def save_pretrained(
        self, folder: str | os.PathLike[str], adapter_name: str | None = None, is_main_process: bool = True, **_: Any
    ) -> Path:
        """Write one adapter as a PEFT folder: `adapter_name`, or the only one, or the only one that acts.

        In a folder of transformers' Trainer (`checkpoint-500`) stands what Trainer resumes from too, and of several
        adapters that act each has a folder inside. Only the main process writes. Other keywords, which Trainer
        passes, say nothing here. Of a model that `fully_shard` spread, every process calls this. No network call is
        made.
        """
        from veneer.files.live import save

        return save(self, Path(folder), adapter_name, is_main_process)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in PyTorch, but for the checkpoint of adapters, which is loaded with `strict=False`.

        Its tensors fit the adapters that the model carries, or `AdapterError` is raised and nothing is loaded; what of
        the base is missing there is not told.
        """
        own = own_state(self)
        given = {key: value for key, value in state_dict.items() if ".adapters." in key}
        wrong = [key for key, value in given.items() if key not in own or value.shape != own[key].shape]
        if wrong and not strict:
            said = f"the weights are of other adapters than the model has: {collapsed(wrong)}"
            raise AdapterError(f"{said}; give it the same ones first")
        partial = not strict and given.keys() == state_dict.keys()
        self.adapter_plan.refuse_merged("loading weights")
        result = super().load_state_dict(state_dict, strict, assign)
        return result._replace(missing_keys=[key for key in own if key not in given]) if partial else result

    def disable_adapters(self) -> None:
        """The base model acts from now on, until `enable_adapters`; for a block there is `disable_adapter`."""
        plan = self.adapter_plan
        plan.refuse_merged("disabling adapters")
        plan.disabled = plan.terms or plan.disabled
        plan.act(())

    def enable_adapters(self) -> None:
        """What acted before `disable_adapters` acts again."""
        plan = self.adapter_plan
        plan.refuse_merged("enabling adapters")
        plan.act(plan.terms or plan.carried(plan.disabled))

    def get_layer_status(self) -> "list[LayerStatus]":
        """What each adapted layer carries, in the model's order."""
        from veneer.analyse.live import layer_status

        return layer_status(self)

    def get_model_status(self) -> "ModelStatus":
        """What the model carries as a whole; `print` shows it a fact a line."""
        from veneer.analyse.live import model_status

        return model_status(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(parameters that train, all parameters), adapters included."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many, and the share."""
        trains, every = self.get_nb_trainable_parameters()
        print(f"trainable params: {trains:,} || all params: {every:,} || trainable%: {100 * trains / every:.4f}")


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """What adapters add to the model's state dict."""
    return {
        f"{path}.adapters.{key}": gathered(tensor).contiguous()
        for path, layer in adapted_layers(model)
        for key, tensor in layer.adapters.state_dict().items()
    }


@contextmanager
def watching(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Warn of the layers with acting adapters that were not called inside: they would learn nothing."""
    acting = {term.adapter for term in plan.terms}
    idle: dict[nn.Module, str] = {layer: path for path, layer in adapted_layers(model) if acting & {*layer.adapters}}

    def called(layer: nn.Module, inputs: object) -> None:
        idle.pop(layer, None)

    with ExitStack() as hooks:
        for layer in idle:
            hooks.callback(layer.register_forward_pre_hook(called).remove)
        yield
    plan.watched |= acting
    if idle:
        told = collapsed(idle.values())
        warnings.warn(f"adapted layers that the model did not call, so they learn nothing: {told}", stacklevel=3)
