"""What recipes say about pictures with captions."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from veneer.core.errors import AdapterError
from veneer.train.data.settings import PicturesData
from veneer.train.settings import Settings

Points = Annotated[int, Field(ge=8, le=16384)]


class BucketSettings(Settings):
    """Shapes that pictures are learned in, each about as large as `resolution`."""

    step: Points | None = Field(
        None,
        description="Widths and heights are multiples of this: 64, or 8 where the resolution is under 256; rounded up "
        "to what the base takes.",
    )
    smallest: Points | None = Field(None, description="The shortest side; half of the resolution's, if not said.")
    largest: Points | None = Field(None, description="The longest side; twice the resolution's, if not said.")
    upscale: bool = Field(
        False,
        description="Enlarge pictures that are smaller than their bucket; else they are learned in a smaller one.",
    )


class CaptionedData(PicturesData):
    """The `data` part for text-to-image."""

    path: str = Field(
        min_length=1,
        description="The pictures to learn from: a folder with a .txt or .caption file beside each picture, or with "
        "metadata.jsonl or metadata.csv (file_name and text); a .jsonl, .json, .csv or .tsv file that names pictures "
        "beside it; a .parquet file; or a dataset of the Hugging Face hub as owner/name.",
    )
    eval_share: float = Field(
        0.0, ge=0, lt=1, description="The share of the pictures that is kept aside where none are named; 0 keeps none."
    )
    caption: str | None = Field(
        None, description="The column of the captions. Without it: text, caption, prompt, … whatever is there."
    )
    instance_prompt: str | None = Field(
        None,
        min_length=1,
        description="The caption of every picture that has none, as in DreamBooth: a photo of sks dog.",
    )
    trigger: str | None = Field(
        None,
        min_length=1,
        description="A word that is put before every caption that has it nowhere, and kept with the adapter.",
    )
    caption_dropout: float = Field(
        0.0, ge=0, le=1, description="The share of the steps in which a picture is learned with an empty caption."
    )
    repeats: bool = Field(
        True,
        description="In a folder whose folders are all named like 10_sks dog (kohya's habit), each picture is learned "
        "10 times an epoch, and is called sks dog where it has no caption.",
    )
    resolution: tuple[Points, Points] | None = Field(
        None, description="Width and height that is learned, or one number for both; the base's own, if not said."
    )
    crop: Literal["center", "random"] = Field(
        "center", description="The part of a picture that is learned, where it has another shape."
    )
    flip: bool = Field(False, description="Turn every second picture left to right, by chance.")
    buckets: BucketSettings | None = Field(
        None,
        description="Learn each picture in the shape nearest to its own instead of cropping all to one; true, or "
        "{step, smallest, largest, upscale}.",
    )
    class_path: str | None = Field(
        None,
        min_length=1,
        description="DreamBooth's prior preservation: a folder of pictures of the class, which the base should keep; "
        "those that lack are made by the base.",
    )
    class_prompt: str | None = Field(
        None, min_length=1, description="The caption of the class pictures: a photo of a dog."
    )
    class_pictures: int = Field(100, ge=1, description="So many pictures of the class are needed.")
    prior_weight: float = Field(1.0, ge=0, description="How much a class picture counts beside one of `path`.")
    cache: bool = Field(
        True, description="Keep what the frozen encoders make of pictures and captions, so that they run once."
    )
    latents: str | None = Field(
        None,
        min_length=1,
        description="A safetensors file with the latents of each picture, computed elsewhere, under its name.",
    )

    @field_validator("class_path", "latents")
    @classmethod
    def _resolved(cls, path: str | None) -> str | None:
        return str(Path(path).expanduser().resolve()) if path else path

    @field_validator("resolution", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("buckets", mode="before")
    @classmethod
    def _usual(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @model_validator(mode="after")
    def _together(self) -> "CaptionedData":
        problems = []
        if (self.class_path is None) != (self.class_prompt is None):
            problems.append("data.class_path and data.class_prompt belong together: say both, or neither")
        if self.latents and (self.flip or self.crop == "random"):
            problems.append("data.latents are of whole pictures as they are: set data.flip=false and data.crop=center")
        if self.class_path and self.latents:
            problems.append("data.latents has none of the class pictures: leave out data.class_path or data.latents")
        if problems:
            raise AdapterError("; ".join(problems))
        return self
