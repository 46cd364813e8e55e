"""What recipes say about pictures: classes of whole pictures, and classes of their pixels."""

from typing import Literal

from pydantic import Field, field_validator

from veneer.train.data.settings import PicturesData
from veneer.train.settings import EvalSettings, Recipe, Settings


class PictureData(PicturesData):
    """What the `data` part of both tasks says."""

    labels: list[str] | None = Field(
        None, min_length=2, description="The names of the classes, in the order of their numbers."
    )
    size: int | None = Field(
        None, ge=8, description="The side of the square that the model is given; the base's own, if not said."
    )
    flip: bool = Field(True, description="Turn every second picture left to right, by chance, while it is learned.")


class ClassificationData(PictureData):
    """The `data` part for image-classification."""

    label: str | None = Field(
        None, description="The column of the class. Without it: label, class, … ; in a folder of folders, their names."
    )
    least: float = Field(
        0.35,
        gt=0,
        le=1,
        description="A random part of each picture is learned, which has at least this share of its area; 1: the "
        "picture as it is measured.",
    )


class SegmentationData(PictureData):
    """The `data` part for semantic-segmentation: a mask has the number of its class for each pixel."""

    masks: str | None = Field(
        None, description="The folder of the masks, named as the pictures are; where path is a folder of pictures."
    )
    eval_masks: str | None = Field(None, description="The folder of the masks of eval_path.")
    mask: str | None = Field(
        None, description="The column of the masks. Without it: mask, annotation, label, … whatever is there."
    )
    ignore_index: int = Field(255, ge=0, description="The number of pixels that are neither learned nor measured.")
    reduce_labels: bool = Field(
        False, description="Masks count their classes from 1, and 0 is not learned (as in ADE20K)."
    )
    least: float = Field(
        0.25,
        gt=0,
        le=1,
        description="A random part of each picture is learned, which has at least this share of its area; 1: all.",
    )

    @field_validator("masks", "eval_masks")
    @classmethod
    def _masks_in_full(cls, path: str | None) -> str | None:
        return cls._named_in_full(path)


class PictureEvaluation(EvalSettings):
    """What the `eval` part of both tasks says."""

    rows: int | None = Field(
        None,
        ge=1,
        description="The most held-out pictures that figures are measured on, evenly spread; all, if not said.",
    )


class ClassificationEvaluation(PictureEvaluation):
    """The `eval` part for image-classification."""

    judge: Literal["accuracy", "loss"] = Field(
        "accuracy", description="The figure that says which of two adapters is better."
    )


class SegmentationEvaluation(PictureEvaluation):
    """The `eval` part for semantic-segmentation."""

    judge: Literal["mean_iou", "pixel_accuracy", "loss"] = Field(
        "mean_iou", description="The figure that says which of two adapters is better."
    )


class PictureSample(Settings):
    """The `sample` part."""

    count: int = Field(
        8, ge=0, description="How many held-out pictures are drawn in samples/ with what the model says of them."
    )
    every_steps: int | None = Field(
        None, ge=1, description="Draw them every so many steps too, and not at the end alone."
    )


class ClassificationRecipe(Recipe):
    """A recipe for image-classification."""

    data: ClassificationData
    eval: ClassificationEvaluation = Field(default_factory=ClassificationEvaluation)
    sample: PictureSample = Field(default_factory=PictureSample)


class SegmentationRecipe(Recipe):
    """A recipe for semantic-segmentation."""

    data: SegmentationData
    eval: SegmentationEvaluation = Field(default_factory=SegmentationEvaluation)
    sample: PictureSample = Field(default_factory=PictureSample)
