"""Rows become comparisons, a prompt with a chosen and a rejected completion, and comparisons become tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from veneer.core.errors import AdapterError, listed
from veneer.train.data.rows import Row, Rows
from veneer.train.language.report import Fate
from veneer.train.language.settings import PreferenceData
from veneer.train.language.shapes import Document, as_bytes, filled, of_bytes, text_of
from veneer.train.language.tokens import Encoded, Example, encode
from veneer.train.language.turns import Chat, Message, tools_of, turns_of

COLUMNS = ("prompt", "chosen", "rejected")
OF_REJECTED = 2  # the bit of a token's flag that says so


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row: the prompt with each of its completions."""

    place: str
    chosen: Document
    rejected: Document

    @property
    def opening(self) -> str | Chat:
        """What a model is given to generate from."""
        return self.chosen.opening

    @property
    def answer(self) -> str:
        """What the row finds a good answer."""
        return self.chosen.answer

    @property
    def key(self) -> str:
        """What comparisons with the same prompt share."""
        return self.chosen.key

    def packed(self) -> bytes:
        """All but the place, as bytes."""
        return as_bytes([self.chosen.plain(), self.rejected.plain()])

    @classmethod
    def unpacked(cls, packed: bytes, place: str) -> "Comparison":
        """What `packed` made bytes of."""
        return cls(place, *(Document.of(plain, place) for plain in of_bytes(packed)))


def settle_shape(rows: Rows, settings: PreferenceData) -> None:
    """Say in the settings how a row is read, where they do not."""
    if settings.prompt is not None:
        settings.shape = "prompt-completion"
    if settings.shape != "auto":
        return
    first = next(iter(rows)).values
    if lacking := [name for name in COLUMNS[1:] if name not in first]:
        raise AdapterError(
            f"{rows.source}: expected the columns prompt, chosen and rejected, found {listed(first, 20)} (no "
            f"{listed(lacking)}). Rename columns, or write the rows out of the columns there are: "
            "data.prompt='{question}' data.chosen='{better}' data.rejected='{worse}'"
        )
    settings.shape = "prompt-completion" if isinstance(first["chosen"], str) else "messages"


def comparison(row: Row, settings: PreferenceData) -> Comparison:
    """One row."""
    if settings.shape == "messages":
        return _of_messages(row)
    templates = [settings.prompt, settings.chosen, settings.rejected]
    written = [
        text_of(row, name) if template is None else filled(template, row)
        for name, template in zip(COLUMNS, templates, strict=True)
    ]
    prompt, *completions = written
    if settings.chat:
        turn: Message = {"role": "user", "content": prompt}
        turns = [(turn, {"role": "assistant", "content": text}) for text in completions]
        return Comparison(row.place, *(Document(row.place, messages=own, given=1) for own in turns))
    return Comparison(row.place, *(Document(row.place, prompt, text) for text in completions))


def _of_messages(row: Row) -> Comparison:
    """The prompt is a text, messages, or what chosen and rejected have in common."""
    chosen, rejected = (turns_of(row.values.get(name), name, row.place) for name in COLUMNS[1:])
    prompt: tuple[Message, ...] = ()
    match row.values.get("prompt"):
        case None:
            shared = sum(1 for _ in _while_equal(chosen, rejected))
            prompt = chosen[: min(shared, len(chosen) - 1)]
        case str(text):
            roles = [turn["role"] for turn in chosen]
            whole = "user" in roles and roles[0] != "assistant"
            prompt = chosen[: roles.index("user") + 1] if whole else ({"role": "user", "content": text},)
        case turns:
            prompt = turns_of(turns, "prompt", row.place)
    tools = tools_of(row.values.get("tools"), row.place)
    found = []
    for name, own in zip(COLUMNS[1:], (chosen, rejected), strict=True):
        turns = own if own[: len(prompt)] == prompt else (*prompt, *own)
        if not prompt or "assistant" not in [turn["role"] for turn in turns[len(prompt) :]]:
            raise AdapterError(f"{row.place}: expected a prompt, and a turn of the assistant behind it in {name!r}")
        found.append(Document(row.place, messages=turns, tools=tools, given=len(prompt)))
    return Comparison(row.place, *found)


def _while_equal(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Iterator[Message]:
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            return
        yield a


def encode_comparisons(
    comparisons: Iterable[Comparison], tokenizer: Any, settings: PreferenceData
) -> Iterator[Encoded]:
    """Each comparison as tokens: those of the chosen text, and behind them those of the rejected one, flagged so."""
    documents = (document for own in comparisons for document in (own.chosen, own.rejected))
    encoded = encode(documents, tokenizer, settings)
    while pair := tuple(islice(encoded, 2)):
        chosen, rejected = pair
        length = max(chosen.length, rejected.length)
        fate = max(chosen.fate, rejected.fate)
        if fate <= Fate.CUT and _prompt(chosen) != _prompt(rejected):
            fate = Fate.DROPPED  # the prompts were cut in different places
        if fate > Fate.CUT:
            yield Encoded([], b"", length, fate)
            continue
        flags = bytes(flag | OF_REJECTED for flag in rejected.learned)
        yield Encoded(chosen.ids + rejected.ids, chosen.learned + flags, length, fate)


def _prompt(encoded: Encoded) -> list[int]:
    return encoded.ids[: encoded.learned.index(1)]


def halves(example: Example) -> tuple[Example, Example]:
    """The chosen and the rejected text of an example."""
    border = next(i for i, flag in enumerate(example.learned) if flag & OF_REJECTED)
    plain = bytes(flag & 1 for flag in example.learned)
    return (
        Example(example.ids[:border], plain[:border], example.row),
        Example(example.ids[border:], plain[border:], example.row),
    )
