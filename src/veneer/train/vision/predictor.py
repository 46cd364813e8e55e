"""A model that sees, from its folders: to be asked what it makes of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from veneer import zoo
from veneer.core.errors import AdapterError, listed
from veneer.core.model import PeftModel
from veneer.files.folder import read_config
from veneer.safe.whole import write_folder
from veneer.train.bases.loading import choose_device, choose_dtype
from veneer.train.data.pictures import inside
from veneer.train.drawing.sheet import painted
from veneer.train.trained import base_with_head
from veneer.train.vision.picture_task import PictureTask


def said_of_pictures(
    adapter: Path, files: Sequence[Path], base: str | None, dtype: str, device: str, out: Path | None = None
) -> list[dict[str, Any]]:
    """What the adapted model says of each picture: a label, or the share of its pixels that each class has. The masks
    go into the folder `out`, all or none. Raises `AdapterError` for an adapter that was not trained on pictures.
    """
    task = _loaded(adapter, base, dtype, device)
    found = [
        own for file in files for own in ([file / name for name in sorted(inside(file))] if file.is_dir() else [file])
    ]
    if not found:
        raise AdapterError(f"{listed(map(str, files))}: there are no pictures")
    said = [{"picture": str(file), **_says(task, file)} for file in found]
    masks = {file: own.pop("mask") for file, own in zip(found, said, strict=True) if "mask" in own}
    if not masks or out is None:
        return said
    if len({file.stem for file in masks}) < len(masks):
        raise AdapterError(f"the masks of pictures of one name cannot lie in one folder: {listed(map(str, masks))}")

    def fill(folder: Path) -> None:
        for file, mask in masks.items():
            painted(mask, len(task.data.labels)).save(folder / f"{file.stem}.png")

    try:
        write_folder(out, fill)
    except OSError as error:
        raise AdapterError(f"{out} cannot be written: {error.strerror or error}") from error
    return said


def _loaded(folder: Path, base: str | None, dtype: str, device: str) -> PictureTask:
    named = base or read_config(folder).base_model_name_or_path
    if not named:
        raise AdapterError(f"{folder} does not say which base it is for: give --base")
    place, chosen = zoo.resolve(named), choose_device(device)
    task = base_with_head(folder, place, choose_dtype(dtype, chosen, place), chosen)
    if not isinstance(task, PictureTask):
        asking = "predict --text" if task else "generate"
        raise AdapterError(f"{folder} is no adapter of a model for pictures: ask it by `veneer {asking}`")
    task.model = PeftModel.from_pretrained(task.model, folder).eval()
    return task


@torch.no_grad()
def _says(task: PictureTask, file: Path) -> dict[str, Any]:
    return task.says(task.read(file, str(file)))
