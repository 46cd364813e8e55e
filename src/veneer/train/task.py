"""`Task`: what a modality gives the loop, batches and loss; the loop knows neither text nor images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from veneer.core.model import PeftModel
from veneer.train.settings import Recipe

USE = """on the base loaded with transformers, with veneer or with PEFT:

```python
model = PeftModel.from_pretrained(model, "ADAPTER")
```"""


@dataclass
class Batch:
    """Some rows, ready for the model."""

    inputs: dict[str, Tensor]
    units: int  # what the loss is averaged over: learned tokens, pictures, …
    amount: int  # what goes through the model, padding not counted, in the task's unit
    places: list[str]  # where the rows came from, for messages


@dataclass(frozen=True)
class Report:
    """What is read, for people."""

    told: list[str]

    def sentences(self) -> list[str]:
        return self.told


class Reporter:
    """Is told what happens; this one is silent, the command line's draws."""

    def say(self, text: str) -> None:
        """A sentence for the person who waits."""

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total` of something that takes a while."""

    def measured(self, record: dict[str, float]) -> None:
        """Held-out figures, with the step that they were measured after."""

    def step(self, record: dict[str, float], steps: int, unit: str) -> None:
        """An optimizer step of `steps` is done; the record says under `unit` how much went through the model."""


class Task(ABC):
    """A model with a fresh adapter, and the rows that it learns from."""

    settings: ClassVar[type[Recipe]]  # the task's own recipe
    pipeline: ClassVar[str] = "text-generation"  # what the hub calls the task
    asking: str = "generate {adapter} --compare --prompt {prompt}"  # the command that uses the adapter
    library: ClassVar[str] = "peft"  # which reads the adapter's files
    python: ClassVar[str] = USE  # how a model card says that it is used in Python
    sampled: ClassVar[str] = "A held-out row"  # what a model card calls a sample
    unit: ClassVar[str] = "tokens"  # what goes through the model, as people and metrics.jsonl count it
    held_out_loss: str = "held out"  # what its curve is called beside the training's
    judged_by: str = "eval_loss"  # the figure that says which of two adapters is better
    higher_is_better: bool = False
    model: PeftModel
    size: int  # rows to learn from
    groups: Tensor | None = None  # of each row `(size,)`: only rows of one go through the model at once
    step: int = 0  # that `batches` makes rows for, which decides with the seed and the row what is drawn of it
    turns: Sequence[int] = ()  # how often each of these rows has come up in the step before
    strata: Sequence[tuple[int, int]] = ()  # the place of each of these rows in the step, of so many

    @abstractmethod
    def __init__(self, recipe: Any, reporter: Reporter) -> None: ...

    @classmethod
    def looked_at(cls, recipe: Any, reporter: Reporter) -> Self:
        """The task, to be looked at: nothing that a run would leave is made."""
        return cls(recipe, reporter)

    @abstractmethod
    def batches(self, rows: Sequence[int]) -> list[Batch]:
        """These rows, by number, on the model's device, in as many passes as go through it one after another."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss summed over the batch's units, in fp32."""

    def rates(self) -> dict[str, float]:
        """The highest learning rates of the model's modules that have one of their own, by path."""
        return {}

    @abstractmethod
    def evaluate(self, whole: bool) -> dict[str, float]:
        """Figures on held-out rows; `whole`: also those that take longer, for before and after the training."""

    @abstractmethod
    def sample(self) -> list[dict[str, str]]:
        """What the base and the adapted model make of a few held-out inputs."""

    def draw(self, path: Path) -> bool:
        """Write what `sample` has found last as a PNG file, where there is something to look at."""
        return False

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a person wants to know before a run: sizes, lengths, how much memory it will take."""

    @abstractmethod
    def made_of(self) -> dict[str, str]:
        """Digests of the rows and the base, by what they are: equal ones give equal steps."""

    @abstractmethod
    def usage(self) -> dict[str, Any]:
        """What must be known to use the adapter as it was trained; kept beside it."""

    def save(self, folder: Path) -> None:
        """Write the adapter, whole or not at all, as those who use it read it."""
        self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Let the adapter be the one that `save` has written there."""
        self.model.delete_adapter("default")
        self.model.load_adapter(folder, "default")
        self.model.set_adapter("default")
