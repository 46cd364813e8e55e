"""Pictures in tables: Parquet files and hub datasets, memory-mapped by `datasets`."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from veneer.core.errors import AdapterError
from veneer.train.data.reading import Raw
from veneer.zoo.cache import cache_folder


@dataclass(frozen=True)
class PictureTable:
    """A table of `datasets`, whose pictures are given as they are stored."""

    source: str
    rows: Any
    content: Callable[[], str]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        return list(self.rows.column_names)

    @property
    def pictures(self) -> list[str]:
        """The columns that are said to hold pictures."""
        from datasets import Image

        return [name for name, feature in self.rows.features.items() if isinstance(feature, Image)]

    def raw(self, column: str, folder: Path) -> Callable[[int], Raw]:
        """The picture of a row in that column: its bytes, or its file, as seen from the folder."""
        from datasets import Image

        feature = self.rows.features[column]
        own = self.rows.select_columns([column])
        if isinstance(feature, Image):
            own = own.cast_column(column, Image(decode=False))

        def read(row: int) -> Raw:
            value = own[row][column]
            if isinstance(value, dict):
                value = value.get("bytes") or value.get("path")
            if isinstance(value, bytes):
                return value
            if isinstance(value, str):
                return folder / value
            raise AdapterError(f"{self.source}, row {row + 1}: {column!r} is {value!r:.80}, expected a picture")

        return read

    def label(self, column: str | None, optional: bool = False) -> Callable[[int], Any]:
        """The label of a row in that column, by its name where the table knows it. Where it has none, or there is no
        such column: None, if it is `optional`.
        """
        if column is None:
            return lambda row: None
        names = getattr(self.rows.features[column], "names", None)
        values = self.rows.select_columns([column]).with_format("numpy" if names else None)[:][column]

        def read(row: int) -> Any:
            value = values[row]
            if value is None and optional:
                return None
            if value is None or (names and value < 0):
                raise AdapterError(f"{self.source}, row {row + 1}: {column!r} is missing")
            return names[int(value)] if names else value

        return read


def table_of(path: str, split: str, subset: str | None) -> PictureTable:
    """A Parquet file, or a split of a hub dataset. Raises `AdapterError` where it cannot be loaded."""
    try:
        import datasets
    except ImportError as error:
        raise AdapterError("pictures in tables need: pip install 'veneer[train]'") from error
    file = Path(path)
    cache = str(cache_folder() / "tables") if file.exists() else None
    try:
        if file.is_file():
            table = datasets.Dataset.from_parquet(str(file), cache_dir=cache)
        else:
            table = datasets.load_dataset(path, subset, split=split, cache_dir=cache)
    except Exception as error:  # the library raises a dozen unrelated kinds; to a reader they are one
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        what = "cannot be read as Parquet" if file.is_file() else f"the split {split!r} could not be loaded"
        raise AdapterError(f"{path}: {what}: {reason}") from error
    if not len(table):
        raise AdapterError(f"{path}: expected rows, found none")
    source = file.name if file.is_file() else f"{path} ({', '.join(filter(None, [subset, split]))})"

    def content() -> str:
        if file.is_file():
            from hashlib import file_digest

            with file.open("rb") as stream:
                return file_digest(stream, "sha256").hexdigest()
        return sha256(f"{path} {subset} {split} {table._fingerprint}".encode()).hexdigest()

    return PictureTable(source, table, content)
