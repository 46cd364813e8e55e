"""Others that are told what a run measures: TensorBoard, Weights & Biases, trackio. Off, unless a recipe asks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from veneer.core.errors import AdapterError

PROJECT = "veneer"


@dataclass(frozen=True)
class About:
    """The run that is tracked."""

    folder: Path
    identity: str  # of this run alone, also when it goes on: folders of the same name are many
    recipe: Mapping[str, Any]
    step: int  # what was told of later ones is no longer so


@dataclass(frozen=True)
class Tracker:
    """Where figures go besides metrics.jsonl."""

    name: str
    _tell: Callable[[dict[str, float], int], object]
    _end: Callable[[], object]

    def tell(self, figures: dict[str, float], step: int) -> None:
        """Figures by name, and the step that they were measured after. Raises `AdapterError`."""
        with _answering(self.name):
            self._tell(figures, step)

    def end(self) -> None:
        """Nothing more comes. Raises `AdapterError`."""
        with _answering(self.name):
            self._end()


def refuse_missing(names: Sequence[str]) -> None:
    """Raises `AdapterError` for the packages of trackers that are not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise AdapterError(f"log: {' and '.join(missing)} needs: pip install {' '.join(missing)}")


def trackers(names: Sequence[str], about: About) -> list[Tracker]:
    """Those that a recipe asks for. Raises `AdapterError` for one that does not start."""
    found = list[Tracker]()
    for name in names:
        try:
            with _answering(name):
                found.append(Tracker(name, *_OPENED[name](about)))
        except AdapterError:
            for other in found:
                other.end()
            raise
    return found


@contextmanager
def _answering(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of many kinds: no key, no network, no room
        raise AdapterError(f"log: {name} does not work: {error or type(error).__name__}; leave it out") from error


Opened = tuple[Callable[[dict[str, float], int], object], Callable[[], object]]


def _tensorboard(about: About) -> Opened:
    places = import_module("torch.utils.tensorboard")
    writer = places.SummaryWriter(str(about.folder / "tensorboard"), purge_step=about.step + 1)

    def tell(figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return tell, writer.close


def _wandb(about: About) -> Opened:
    own = import_module("wandb")
    own.init(
        project=PROJECT,
        name=about.folder.name,
        id=about.identity,
        dir=str(about.folder),
        config=dict(about.recipe),
        resume="allow",
    )
    return lambda figures, step: own.log(figures, step=step), own.finish


def _trackio(about: About) -> Opened:
    own = import_module("trackio")  # knows runs by their names
    name = f"{about.folder.name}-{about.identity}"
    own.init(project=PROJECT, name=name, config=dict(about.recipe), resume="allow")
    return lambda figures, step: own.log(figures, step=step), own.finish


_OPENED = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
