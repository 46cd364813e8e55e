"""Rows of a language recipe: what is learned from, what is held out, and the prompts among them."""

from dataclasses import dataclass
from typing import Any, TypeVar

from veneer.train.language.rows import read_rows, split_held_out
from veneer.train.language.settings import LanguageData
from veneer.train.language.shapes import Document, detect_shape, documents
from veneer.train.language.tokens import Example, TokenReport, encode

T = TypeVar("T")


@dataclass
class Part:
    """One side of the data: its documents, and those of them that are used, as tokens."""

    documents: list[Document]
    examples: list[Example]
    report: TokenReport

    def place(self, row: int) -> str:
        """Where an example came from."""
        return self.documents[self.examples[row].row].place


@dataclass
class Question:
    """A prompt, and everything that the data answers to it."""

    document: Document
    references: list[str]


def read_documents(settings: LanguageData, seed: int) -> tuple[list[Document], list[Document]]:
    """(learned from, held out). `settings.shape` says afterwards how the rows were read."""
    rows = read_rows(settings.path, settings.split)
    settings.shape = detect_shape(rows, settings)
    learned = documents(rows, settings.shape, settings)
    if settings.eval_path or settings.eval_split:
        rows = read_rows(settings.eval_path or settings.path, settings.eval_split or settings.split)
        return learned, documents(rows, settings.shape, settings)
    return split_held_out(learned, settings.eval_share, seed, lambda document: document.key)


def tokenised(found: list[Document], tokenizer: Any, settings: LanguageData) -> Part:
    """The documents with those of them that are used as tokens."""
    return Part(found, *encode(found, tokenizer, settings))


def questions(part: Part) -> list[Question]:
    """The different prompts of a part, in its order, each with the completions of every row that asks it."""
    found: dict[str, Question] = {}
    for example in part.examples:
        document = part.documents[example.row]
        if document.opening:
            question = found.setdefault(document.key, Question(document, []))
            question.references.append(_answer_of(document))
    return list(found.values())


def evenly(items: list[T], most: int) -> list[T]:
    """At most so many of the items, evenly spread."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _answer_of(document: Document) -> str:
    """The completion, or the first turn of the assistant."""
    turns = (message["content"] for message in document.messages if message["role"] == "assistant")
    return next(turns, "") if document.messages else document.completion.strip()
