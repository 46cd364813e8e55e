"""What every recipe says about its rows."""

from pathlib import Path

from pydantic import Field, field_validator

from veneer.train.settings import Settings


class RowsData(Settings):
    """What the `data` part of every recipe on text says: where the rows are, and which of them are held out."""

    path: str = Field(
        min_length=1,
        description="The rows to learn from: a .jsonl, .json, .csv, .tsv or .parquet file, or a dataset of "
        "the Hugging Face hub as owner/name.",
    )
    eval_path: str | None = Field(
        None,
        min_length=1,
        description="The held-out rows, as a file or a hub dataset. Without it, and without eval_split, "
        "eval_share of the rows is kept aside.",
    )
    subset: str | None = Field(None, description="Which part of a hub dataset that has several: sst2 of nyu-mll/glue.")
    split: str = Field("train", description="Which split of a hub dataset is learned from. A file has none.")
    eval_split: str | None = Field(
        None, description="Which split of a hub dataset (eval_path, or else path) is held out."
    )
    eval_share: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="The share of the rows that is kept aside when no held-out rows are named; 0 keeps none. "
        "Rows with the same prompt, or the same text, stay together.",
    )

    @field_validator("path", "eval_path")
    @classmethod
    def _named_in_full(cls, path: str | None) -> str | None:
        """A file is named in full, so that the recipe of a run can be run again from anywhere."""
        file = Path(path or "").expanduser()
        return str(file.resolve()) if file.is_file() else path


class PicturesData(RowsData):
    """What every recipe on pictures says of where they are."""

    path: str = Field(
        min_length=1,
        description="The pictures to learn from: a folder, a .jsonl, .json, .csv or .tsv file that names pictures "
        "beside it, a .parquet file, or a dataset of the Hugging Face hub as owner/name.",
    )
    eval_path: str | None = Field(
        None,
        min_length=1,
        description="The held-out pictures, in the same way. Without it, and without eval_split, eval_share of the "
        "pictures is kept aside.",
    )
    split: str = Field(
        "train", description="Which split of a hub dataset, or folder in a folder of splits, is learned from."
    )
    eval_split: str | None = Field(None, description="Which split, or folder of splits, is held out.")
    eval_share: float = Field(
        0.05, ge=0, lt=1, description="The share of the pictures that is kept aside where none are named; 0 keeps none."
    )
    image: str | None = Field(
        None, description="The column of the pictures. Without it: image, img, file_name, … whatever is there."
    )

    @field_validator("path", "eval_path")
    @classmethod
    def _named_in_full(cls, path: str | None) -> str | None:
        """Files and folders are named in full, so that the recipe of a run can be run again from anywhere."""
        file = Path(path or "").expanduser()
        return str(file.resolve()) if path and file.exists() else path
