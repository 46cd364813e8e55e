"""Rows of a language recipe: what is learned from, what is held out, and the prompts among them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from veneer.train.data.settings import RowsData
from veneer.train.language import sources
from veneer.train.language.report import TokenReport, reported
from veneer.train.language.settings import PairsData, TextData
from veneer.train.language.shapes import Document
from veneer.train.language.sources import D, Documents, Examples
from veneer.train.language.tokens import Encoded, encode
from veneer.train.task import Reporter

T = TypeVar("T")
SILENT = Reporter()


@dataclass
class Part:
    """One side of the data: its documents, and those of them that are used, as tokens."""

    documents: Documents[Any]  # they have an `opening` and an `answer`
    examples: Examples
    report: TokenReport

    def place(self, row: int) -> str:
        """Where an example came from."""
        return self.documents.place(int(self.examples.rows[row]))


@dataclass
class Question:
    """A prompt, and everything that the data answers to it."""

    document: Any
    references: list[str]


def read_documents(
    settings: PairsData, seed: int, reporter: Reporter = SILENT
) -> tuple[Documents[Document], Documents[Document]]:
    """(learned from, held out). `settings.shape` says afterwards how the rows were read."""
    return read_sides(settings, seed, lambda path, split: sources.read(path, split, settings, reporter), reporter)


def read_sides(
    settings: RowsData, seed: int, read: Callable[[str, str], Documents[D]], reporter: Reporter = SILENT
) -> tuple[Documents[D], Documents[D]]:
    """(learned from, held out), of what `read` makes of a path and a split."""
    found = read(settings.path, settings.split)
    if settings.eval_path or settings.eval_split:
        return found, read(settings.eval_path or settings.path, settings.eval_split or settings.split)
    return sources.split(found, settings.eval_share, seed, reporter)


def tokenised(
    found: Documents[Any],
    tokenizer: Any,
    settings: TextData,
    reporter: Reporter = SILENT,
    name: str = "rows",
    encode: Callable[[Iterable[Any], Any, Any], Iterable[Encoded]] = encode,
) -> Part:
    """The documents with those of them that are used as tokens; `name` is what the reporter is told that they are."""
    store = sources.tokens(found.source, tokenizer, settings, reporter, name, encode)
    examples = Examples(store, found.chosen)
    report = reported(store.table[found.chosen], examples.lengths, found.place, settings)
    return Part(found, examples, report)


def questions(part: Part) -> list[Question]:
    """The different prompts of a part, in its order, each with the completions of every row that asks it."""
    found: dict[str, Question] = {}
    for row in part.examples.rows:
        document = part.documents[int(row)]
        if document.opening and (answer := document.answer):
            found.setdefault(document.key, Question(document, [])).references.append(answer)
    return list(found.values())
