"""Rows of a language recipe: what is learned from, what is held out, and the prompts among them."""

from dataclasses import dataclass
from typing import Any, TypeVar

from veneer.core.errors import AdapterError
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


def read_parts(settings: LanguageData, tokenizer: Any, seed: int) -> tuple[Part, Part | None]:
    """(learned from, held out); None where the recipe holds nothing out."""
    learned = _documents(settings.path, settings.split, settings)
    held_out: list[Document] = []
    if settings.eval_path or settings.eval_split:
        held_out = _documents(settings.eval_path or settings.path, settings.eval_split or settings.split, settings)
    elif settings.eval_share and len(learned) > 1:
        learned, held_out = split_held_out(learned, settings.eval_share, seed, lambda document: document.key)
    part = Part(learned, *encode(learned, tokenizer, settings))
    try:
        return part, Part(held_out, *encode(held_out, tokenizer, settings)) if held_out else None
    except AdapterError as error:
        raise AdapterError(f"held-out rows: {error}") from error


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


def _documents(path: str, split: str, settings: LanguageData) -> list[Document]:
    rows = read_rows(path, split)
    return documents(rows, detect_shape(rows, settings), settings)


def _answer_of(document: Document) -> str:
    """The completion, or the first turn of the assistant."""
    turns = (message["content"] for message in document.messages if message["role"] == "assistant")
    return next(turns, "") if document.messages else document.completion.strip()
