"""Rows with labels become examples: documents read as a stream, tokenised once, kept in stores, memory-mapped.

An example is a row's tokens as a structured array, a record a token (ids, segments, what a task learns of each), and
its numbers in the store's table: the document that it comes from, and what a task learns of the whole.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np

from veneer.core.errors import AdapterError, listed
from veneer.train.data.labels import written
from veneer.train.data.rows import Row, Rows, Table
from veneer.train.language.report import Tally
from veneer.train.language.sources import Documents, Source, fingerprint
from veneer.train.store import Columns, Pieces, Store, digest_of, prepared
from veneer.train.task import Reporter

Tokens = np.ndarray[Any, np.dtype[Any]]  # (tokens), a record each
Encoded = tuple[Tokens, tuple[float, ...], bool]  # an example, its numbers, whether it was cut
BATCH = 1000  # documents a call of the tokenizer
MOST_NAMES = 10_000  # different labels; with more they are numbers, or a wrong column
OWN: Columns = [("document", "i8"), ("cut", "i1")]


@dataclass(frozen=True, slots=True)
class Labelled:
    """One row: its text or pair of texts, or its words; and its label, or labels."""

    place: str
    texts: tuple[str, ...]
    label: Any = None  # plain JSON

    @property
    def key(self) -> str:
        """What rows with the same texts share."""
        return json.dumps(self.texts, ensure_ascii=False)

    def packed(self) -> bytes:
        """All but the place, as bytes."""
        return json.dumps([self.texts, self.label], ensure_ascii=False).encode("utf-8", "surrogatepass")

    @classmethod
    def unpacked(cls, packed: bytes, place: str) -> "Labelled":
        """What `packed` made bytes of."""
        texts, label = json.loads(packed.decode("utf-8", "surrogatepass"))
        return cls(place, tuple(texts), label)


class Examples(Sequence[Tokens]):
    """The examples of the chosen documents; `of` says which of them each comes from, `lengths` has their tokens."""

    def __init__(self, pieces: Sequence[bytes], sizes: Table, table: Table, chosen: Table, fields: Columns) -> None:
        self.fields = np.dtype(fields)
        numbers = np.flatnonzero(np.isin(table["document"], chosen))
        self.of = np.searchsorted(chosen, table["document"][numbers])
        self.lengths = sizes[numbers] // self.fields.itemsize
        self.table = table[numbers]
        self._pieces, self._numbers = pieces, numbers

    @classmethod
    def of_these(cls, encoded: Iterable[tuple[int, Encoded]], fields: Columns, columns: Columns) -> "Examples":
        """Examples of documents in memory, all of them."""
        made = list(encoded)
        table = np.array([(i, cut, *own) for i, (_, own, cut) in made], np.dtype([*OWN, *columns]))
        pieces = [tokens.tobytes() for _, (tokens, _, _) in made]
        return cls(pieces, np.array([len(piece) for piece in pieces]), table, np.unique(table["document"]), fields)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Tokens:  # type: ignore[override]
        return np.frombuffer(self._pieces[int(self._numbers[index])], self.fields)

    def digest(self) -> str:
        """A name for the examples, tokens and numbers, all of them in their order."""
        own = (np.ascontiguousarray(self.table[name]) for name in self.table.dtype.names or () if name != "end")
        return sha256(b"".join([self.lengths.tobytes(), *(column.tobytes() for column in own)])).hexdigest()


@dataclass
class Part:
    """One side of the data."""

    documents: Sequence[Labelled]
    examples: Examples
    report: "RowReport"

    def place(self, example: int) -> str:
        """Where an example came from."""
        return self.documents[int(self.examples.of[example])].place

    def of_documents(self, documents: Sequence[int]) -> list[int]:
        """The examples of these documents."""
        return np.flatnonzero(np.isin(self.examples.of, documents)).tolist()


@dataclass(slots=True)
class RowReport:
    """What became of the rows; lengths are those of the examples, as they are used."""

    documents: int
    max_length: int
    lengths: Table
    cut: Tally = field(default_factory=Tally)
    labels: Mapping[str, int] | None = None

    def sentences(self) -> list[str]:
        """The report in plain sentences."""
        ordered = np.sort(self.lengths)
        short, half, most, long = (int(ordered[round(share * (len(ordered) - 1))]) for share in (0, 0.5, 0.95, 1))
        pieces = "" if len(ordered) == self.documents else f" in {len(ordered):,} windows"
        said = [
            f"{self.documents:,} rows{pieces}: {int(ordered.sum()):,} tokens. The shortest has {short:,} tokens, the "
            f"longest {long:,}; half have at most {half:,}, 95% at most {most:,}."
        ]
        if self.cut.count:
            said.append(f"Rows longer than data.max_length={self.max_length} and cut: {self.cut.count:,} ({self.cut}).")
        if self.labels:
            told = listed(self.labels, 20, lambda name: f"{name} ({self.labels[name]:,})")  # type: ignore[index]
            said.append(f"Labels: {told}.")
        return said


def reported(
    documents: Sequence[Labelled], examples: Examples, max_length: int, labels: Mapping[str, int]
) -> RowReport:
    """What became of the rows."""
    cut = np.flatnonzero(examples.table["cut"])
    places = [documents[int(examples.of[i])].place for i in cut[:3]]
    return RowReport(len(documents), max_length, examples.lengths, Tally(len(cut), places), labels)


def tokenised(
    source: Source[Labelled],
    tokenizer: Any,
    fields: Columns,
    columns: Columns,
    made_of: Mapping[str, Any],
    encode: Callable[[Sequence[Labelled]], Iterable[tuple[int, Encoded]]],
    reporter: Reporter,
    name: str,
) -> Store:
    """The examples of all documents of a source; `made_of` says what besides documents and tokenizer decides them."""
    made_of = {
        "documents": digest_of(source.documents.made_of),
        "tokenizer": fingerprint(tokenizer),
        "fields": [list(own) for own in fields],
        **made_of,
    }

    def pieces() -> Pieces:
        total = len(source.documents)
        for done, (document, (tokens, numbers, cut)) in encoded(source, encode):
            yield tokens.tobytes(), (document, cut, *numbers)
            if done % BATCH == 0 or done == total:
                reporter.progress(f"{name}: tokenising", done, total)

    return prepared("examples", made_of, [*OWN, *columns], pieces, reporter.say)


def encoded(
    documents: Iterable[Labelled], encode: Callable[[Sequence[Labelled]], Iterable[tuple[int, Encoded]]]
) -> Iterator[tuple[int, tuple[int, Encoded]]]:
    """(documents done, (document, example)): `encode` is given a batch, and says which of it each example is of."""
    rest, begin = iter(documents), 0
    while batch := list(islice(rest, BATCH)):
        for i, example in encode(batch):
            yield begin + i + 1, (begin + i, example)
        begin += len(batch)


def records(fields: Columns, **values: Sequence[int]) -> Tokens:
    """The tokens of an example: for each field its numbers."""
    tokens = np.empty(len(next(iter(values.values()))), np.dtype(fields))
    for name, own in values.items():
        tokens[name] = own
    return tokens


def label_counts(found: Documents[Labelled], reporter: Reporter) -> dict[str, int]:
    """How often each label occurs in the source, as `written`; a `*` stands for those beyond `MOST_NAMES`, which are
    all numbers.
    """

    def pieces() -> Pieces:
        counts: dict[str, int] = {}
        for document in found.source:
            for label in document.label if isinstance(document.label, list) else [document.label]:
                name = written(label)
                if name not in counts and len(counts) > MOST_NAMES:
                    if not is_number(name):
                        raise AdapterError(f"{document.place}: more than {MOST_NAMES:,} different labels, no classes")
                    name = "*"
                counts[name] = counts.get(name, 0) + 1
        yield json.dumps(counts, ensure_ascii=False).encode("utf-8", "surrogatepass"), ()

    made_of = {"documents": digest_of(found.source.documents.made_of)}
    store = prepared("labels", made_of, [], pieces, reporter.say)
    counts: dict[str, int] = json.loads(store[0].decode("utf-8", "surrogatepass"))
    return counts


def is_number(name: str) -> bool:
    """Whether it is a finite number."""
    try:
        return abs(float(name)) < float("inf")
    except ValueError:
        return False


def columns_of(rows: Rows) -> list[str]:
    """The columns of the first rows."""
    return list(dict.fromkeys(name for row in islice(rows, 100) for name in row.values))


def text_of(row: Row, name: str) -> str:
    """The text in a column; numbers are written out."""
    value = row.values.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return str(value)
    raise AdapterError(f"{row.place}: {name!r} is {value!r:.80}, expected text")
