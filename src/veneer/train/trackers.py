"""Others that are told what a run measures: TensorBoard, Weights & Biases, trackio. Off, unless a recipe asks."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from veneer.core.errors import AdapterError

PROJECT = "veneer"


class Tracker(NamedTuple):
    """Where figures go besides metrics.jsonl."""

    tell: Callable[[dict[str, float], int], object]  # figures by name, and the step that they were measured after
    end: Callable[[], object]


def trackers(names: Sequence[str], folder: Path, recipe: Mapping[str, Any]) -> list[Tracker]:
    """Those that a recipe asks for. Raises `AdapterError` for a package that is missing or does not start."""
    return [_OPENED[name](folder, recipe) for name in names]


def _tensorboard(folder: Path, recipe: Mapping[str, Any]) -> Tracker:
    writer = _needed("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def tell(figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return Tracker(tell, writer.close)


def _project(module: str) -> Callable[[Path, Mapping[str, Any]], Tracker]:
    """Weights & Biases, and trackio, which has its words."""

    def opened(folder: Path, recipe: Mapping[str, Any]) -> Tracker:
        own = _needed(module, module)
        try:
            own.init(project=PROJECT, name=folder.name, config=dict(recipe), resume="allow", **_MORE[module](folder))
        except Exception as error:  # of many kinds: no key, no network, no room
            raise AdapterError(f"log: {module} does not start: {error}") from error
        return Tracker(lambda figures, step: own.log(figures, step=step), own.finish)

    return opened


def _needed(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise AdapterError(f"log: {package} needs: pip install {package} ({error})") from error


_MORE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "wandb": lambda folder: {"dir": str(folder), "id": folder.name},
    "trackio": lambda folder: {},
}
_OPENED = {"tensorboard": _tensorboard, "wandb": _project("wandb"), "trackio": _project("trackio")}
