"""veneer: low-rank adapters (LoRA and its family) on any PyTorch model.

Importing this module loads nothing else; each public name is resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "veneer.core.adapter",
    "AdapterError": "veneer.core.errors",
    "LoraConfig": "veneer.core.config",
    "PeftModel": "veneer.core.model",
    "attach": "veneer.files.attach",
    "carriers": "veneer.files.attach",
    "detach": "veneer.files.attach",
    "files": "veneer.files",
    "get_peft_model": "veneer.core.model",
    "initialize_lora_eva_weights": "veneer.starts.eva",
    "initialize_lora_ga_weights": "veneer.starts.lora_ga",
    "lora_plus_groups": "veneer.train.optimizers",
    "zoo": "veneer.zoo",
}
__all__ = [
    "Adapter",
    "AdapterError",
    "LoraConfig",
    "PeftModel",
    "__version__",
    "attach",
    "carriers",
    "detach",
    "files",
    "get_peft_model",
    "initialize_lora_eva_weights",
    "initialize_lora_ga_weights",
    "lora_plus_groups",
    "zoo",
]

if TYPE_CHECKING:
    from veneer import files, zoo
    from veneer.core.adapter import Adapter
    from veneer.core.config import LoraConfig
    from veneer.core.errors import AdapterError
    from veneer.core.model import PeftModel, get_peft_model
    from veneer.files.attach import attach, carriers, detach
    from veneer.starts.eva import initialize_lora_eva_weights
    from veneer.starts.lora_ga import initialize_lora_ga_weights
    from veneer.train.optimizers import lora_plus_groups


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    value = home if home.__name__ == f"veneer.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
