"""Rows read as a stream, tokenised in batches, and kept in stores of the cache, which are memory-mapped.

There are three kinds of stores: `documents` (made of the data file's bytes and the settings that say how its rows are
read), `draws` (of the documents and the seed: which of them are held out) and `tokens` (of the documents, the tokenizer
and the settings of lengths). So with another seed nothing is tokenised anew, with another tokenizer nothing read anew.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from veneer.core.errors import AdapterError
from veneer.train.data import rows
from veneer.train.data.rows import Rows, Table
from veneer.train.language import shapes
from veneer.train.language.settings import PairsData, TextData
from veneer.train.language.shapes import Document
from veneer.train.language.tokens import TOKEN_BYTES, Encoded, Example, bos_of, refuse_slow, unpacked
from veneer.train.store import Columns, Pieces, Store, digest_of, prepared
from veneer.train.task import Reporter

DOCUMENTS: Columns = [("number", "i8")]
DRAWS: Columns = [("draw", "f8")]
TOKENS: Columns = [("length", "i4"), ("learned", "i4"), ("fate", "i1")]
PROGRAM = (  # decide what is in a store
    *("chat.py", "comparisons.py", "pairs.py", "report.py", "settings.py", "shapes.py", "tokens.py", "turns.py"),
    *("../data/rows.py", "../data/settings.py"),
)


class Packable(Protocol):
    """A document of any kind."""

    @property
    def key(self) -> str:
        """What documents share that stay on one side of the data."""

    def packed(self) -> bytes:
        """All but the place, as bytes."""


D = TypeVar("D", bound=Packable)


@dataclass
class Source(Generic[D]):
    """A file or dataset: its rows, their documents, and their tokens once they are asked for."""

    rows: Rows
    documents: Store
    unpacked: Callable[[bytes, str], D]
    tokens: Store | None = None

    def __iter__(self) -> Iterator[D]:
        """All documents, one after the other."""
        for number, packed in zip(self.documents.table["number"], self.documents, strict=True):
            yield self.unpacked(packed, self.rows.place(number))


class Documents(Sequence[D]):
    """The chosen documents of a source; each is read from the disk when it is asked for."""

    def __init__(self, source: Source[D], chosen: Table) -> None:
        self.source, self.chosen = source, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> D:  # type: ignore[override]
        return self.source.unpacked(self.source.documents[int(self.chosen[index])], self.place(index))

    def place(self, index: int) -> str:
        """Where a document is, for messages."""
        return self.source.rows.place(int(self.source.documents.table["number"][self.chosen[index]]))


class Examples(Sequence[Example]):
    """Those of the chosen rows that are used, as tokens: `rows` says which they are, `lengths` has their tokens."""

    def __init__(self, tokens: Store, chosen: Table) -> None:
        sizes = tokens.sizes()[chosen]
        self.rows = np.flatnonzero(sizes)
        self.lengths = sizes[self.rows] // TOKEN_BYTES
        self._tokens, self._chosen = tokens, chosen[self.rows]

    def digest(self) -> str:
        """A name for the tokens, all of them in their order."""
        return sha256(self.lengths.tobytes() + self._tokens.table["sum"][self._chosen].tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return unpacked(self._tokens[int(self._chosen[index])], int(self.rows[index]))


def read(path: str, split: str, settings: PairsData, reporter: Reporter) -> Documents[Document]:
    """All documents of a file or dataset. `settings.shape` says afterwards how its rows were read."""
    found = rows.read_rows(path, split, settings.subset)
    shape = settings.shape = shapes.detect_shape(found, settings)
    asked = settings.model_dump(include={"prompt", "completion", "chat"})
    made_of = {"shape": shape, **asked, "last": settings.learn == "last", "program": program(PROGRAM)}
    return kept(found, made_of, lambda: shapes.documents(found, shape, settings), Document.unpacked, reporter)


def kept(
    found: Rows,
    made_of: Mapping[str, Any],
    documents: Callable[[], Iterable[tuple[int, D]]],
    unpacked: Callable[[bytes, str], D],
    reporter: Reporter,
) -> Documents[D]:
    """All documents of the rows, from their store; `made_of` and the rows decide them."""
    made_of = {"rows": found.content(), **made_of}

    def pieces() -> Pieces:
        for number, made in documents():
            yield made.packed(), (number,)
        if found.content() != made_of["rows"]:
            raise AdapterError(f"{found.source} was changed while it was read; nothing is kept of it, start again")

    store = prepared("documents", made_of, DOCUMENTS, pieces, reporter.say)
    return Documents(Source(found, store, unpacked), np.arange(len(store)))


def split(found: Documents[D], share: float, seed: int, reporter: Reporter) -> tuple[Documents[D], Documents[D]]:
    """(learned from, held out)."""
    if not share:
        return found, Documents(found.source, found.chosen[:0])

    def pieces() -> Pieces:
        return ((b"", (rows.draw(document.key, seed),)) for document in found.source)

    made_of = {"documents": digest_of(found.source.documents.made_of), "seed": seed}
    draws = prepared("draws", made_of, DRAWS, pieces, reporter.say).table["draw"]
    held = rows.held_out(draws, share)
    return Documents(found.source, found.chosen[~held]), Documents(found.source, found.chosen[held])


def tokens(
    source: Source[D],
    tokenizer: Any,
    settings: TextData,
    reporter: Reporter,
    name: str,
    encode: Callable[[Iterable[D], Any, Any], Iterable[Encoded]],
) -> Store:
    """The tokens of all documents of a source, as `encode` makes them with the tokenizer and the settings."""
    made_of = {
        "documents": digest_of(source.documents.made_of),
        "tokenizer": fingerprint(tokenizer),
        **settings.model_dump(include={"learn", "max_length", "max_completion", "too_long", "chat"}),
        "program": program(PROGRAM),
    }
    if source.tokens is not None and source.tokens.made_of == made_of:
        return source.tokens
    began, total = time.monotonic(), len(source.documents)

    def pieces() -> Pieces:
        for done, encoded in enumerate(encode(source, tokenizer, settings), 1):
            yield encoded.packed(), (encoded.length, encoded.units, encoded.fate)
            if done % 1000 == 0 or done == total:
                reporter.progress(f"{name}: tokenising", done, total)

    store = source.tokens = prepared("tokens", made_of, TOKENS, pieces, reporter.say)
    if store.fresh:
        reporter.say(f"{name}: tokenised in {time.monotonic() - began:.1f} s and kept in {store.folder}")
    else:
        reporter.say(f"{name}: the tokens are read from the cache, {store.folder}")
    return store


def fingerprint(tokenizer: Any) -> str:
    """A hash of all that decides what `encode` makes of a text."""
    import tokenizers
    import transformers

    refuse_slow(tokenizer)
    bos = bos_of(tokenizer)  # and a call has the backend's padding and truncation as every other leaves them
    template = json.dumps(tokenizer.chat_template)
    own = [type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.split_special_tokens, template, bos]
    today = time.strftime("%Y-%m-%d") if "strftime_now" in template else ""
    versions = [tokenizers.__version__, transformers.__version__]
    said = json.dumps([*own, today, versions, tokenizer.backend_tokenizer.to_str()], sort_keys=True, default=str)
    return sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


@cache  # of the modules as they were imported, and not as somebody edits them meanwhile
def program(names: tuple[str, ...]) -> str:
    """A hash of our own modules: when one changes, what it made is made anew."""
    return sha256(b"".join(files(__package__).joinpath(name).read_bytes() for name in names)).hexdigest()
