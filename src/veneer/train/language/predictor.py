"""A model with a head from its folders: to be asked what it makes of texts, or to be merged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer import zoo
from veneer.core.errors import AdapterError
from veneer.core.model import PeftModel
from veneer.files.folder import read_config
from veneer.train.bases.loading import choose_device, choose_dtype
from veneer.train.data.rows import read_rows
from veneer.train.language.head_task import HeadTask
from veneer.train.language.labelled import Labelled
from veneer.train.language.shapes import made_of_rows
from veneer.train.trained import base_with_head


@dataclass
class Predictor:
    """A base with a head, an adapter on it, and how texts are read for it."""

    task: HeadTask

    @classmethod
    def load(
        cls, folder: Path, base: str | None = None, dtype: str | None = "auto", device: str = "auto"
    ) -> "Predictor":
        """From an adapter's folder; the base is the one that the adapter names, or `base`.

        `dtype` None is the one that the base is stored in.
        """
        named = base or read_config(folder).base_model_name_or_path
        if not named:
            raise AdapterError(f"{folder} does not say which base it is for: give --base")
        place, chosen = zoo.resolve(named), choose_device(device)
        task = base_with_head(folder, place, dtype and choose_dtype(dtype, chosen, place), chosen)
        if not isinstance(task, HeadTask):
            asking = "predict --picture" if task else "generate"
            raise AdapterError(f"{folder} is no adapter of a model with a head for texts: ask it by `veneer {asking}`")
        task.model = PeftModel.from_pretrained(task.model, folder).eval()
        return cls(task)

    def read(self, file: Path) -> list[Labelled]:
        """The rows of a file, with the columns that the training's had; labels may be missing."""
        rows = read_rows(str(file))
        self.task.settle_columns(rows, labelled=False)
        return [made for _, made in made_of_rows(rows, lambda row: self.task.document(row, labelled=False), "texts")]

    def said_of(self, documents: Sequence[Labelled]) -> list[dict[str, Any]]:
        """What the model says of each: a label, tags, or an answer, and how probable it finds it."""
        return self.task.said_of(documents)
