"""Rows become documents: what is the prompt, the completion, the chat, and in a chat the assistant's part."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from veneer.core.errors import AdapterError, listed, nearest
from veneer.train.data.rows import Row, Rows, Values
from veneer.train.language.settings import PairsData, Shape, TextData, template_parts
from veneer.train.language.turns import Chat, Message, kind_of, tools_of, turns_of

D = TypeVar("D")

# the columns that make a shape, the most telling shape first; alpaca's third column is optional
COLUMNS: dict[Shape, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",), ("conversations",)),
    "alpaca": (("instruction", "output", "input"), ("instruction", "response", "context")),
    "prompt-completion": (
        ("prompt", "completion"),
        ("prompt", "response"),
        ("question", "answer"),
        ("input", "output"),
        ("article", "summary"),
    ),
    "text": (("text",),),
}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class Document:
    """One row, ready for a tokenizer: a plain prompt and completion, or the messages of a chat.

    Of the messages, the first `given` are the prompt, and nothing of them is learned; where it is 0, the prompt is all
    before the first of the assistant's, and all of the assistant's are learned.
    """

    place: str
    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    given: int = 0

    @property
    def opening(self) -> str | Chat:
        """What a model is given to generate from."""
        return Chat(self.messages[: self._border], self.tools) if self.messages else self.prompt

    @property
    def _border(self) -> int:
        roles = [message["role"] for message in self.messages]
        return self.given or (roles.index("assistant") if "assistant" in roles else len(roles))

    @property
    def answer(self) -> str:
        """What the row answers to its opening, as text: of a chat, the next turn."""
        if not self.messages:
            return self.completion.strip()
        return next((str(message["content"]) for message in self.messages[self._border :]), "")

    @property
    def key(self) -> str:
        """What documents with the same prompt share; for plain text, which has no prompt, the text."""
        opening = self.opening or self.completion or list(self.messages)
        return opening if isinstance(opening, str) else json.dumps(opening)

    def plain(self) -> list[Any]:
        """All but the place, as plain JSON."""
        chat = [list(self.messages), list(self.tools), self.given] if self.messages else []
        return [self.prompt, self.completion, *chat]

    @classmethod
    def of(cls, plain: Sequence[Any], place: str) -> "Document":
        """What `plain` has written."""
        prompt, completion, *chat = plain
        messages, tools, given = chat or ((), (), 0)
        return cls(place, prompt, completion, tuple(messages), tuple(tools), given)

    def packed(self) -> bytes:
        """All but the place, as bytes."""
        return as_bytes(self.plain())

    @classmethod
    def unpacked(cls, packed: bytes, place: str) -> "Document":
        """What `packed` made bytes of."""
        return cls.of(of_bytes(packed), place)


def as_bytes(plain: Any) -> bytes:
    """Plain JSON as bytes, half characters included."""
    return json.dumps(plain, ensure_ascii=False).encode("utf-8", "surrogatepass")


def of_bytes(packed: bytes) -> Any:
    """What `as_bytes` made bytes of."""
    return json.loads(packed.decode("utf-8", "surrogatepass"))


def detect_shape(rows: Rows, settings: PairsData) -> Shape:
    """The shape that the settings say, or the one whose columns the first rows have."""
    if settings.prompt is not None:
        return "prompt-completion"
    if settings.shape != "auto":
        return settings.shape
    columns = list(dict.fromkeys(name for row in islice(rows, 100) for name in row.values))
    found = [shape for shape, choices in COLUMNS.items() if any(set(c[:2]) <= set(columns) for c in choices)]
    if found and not (settings.chat and found[0] == "text"):
        return found[0]
    known = "\n".join(
        f"  {shape}: {' or '.join(' + '.join(c[:2]) for c in choices)}" for shape, choices in COLUMNS.items()
    )
    wanted = "a prompt and a completion (data.chat is set)" if settings.chat else "the columns of a shape"
    raise AdapterError(
        f"{rows.source}: expected {wanted}, found the columns {listed(columns, 20)}. The shapes and their "
        f"columns:\n{known}\nRename columns, say data.shape=…, or write the rows out of the columns there are: "
        "data.prompt='Question: {column}' data.completion=' {column}'"
    )


def documents(rows: Rows, shape: Shape, settings: PairsData) -> Iterator[tuple[int, Document]]:
    """Every row's number and document."""
    return made_of_rows(rows, lambda row: document(row, shape, settings), shape)


def made_of_rows(rows: Rows, make: Callable[[Row], D], what: str) -> Iterator[tuple[int, D]]:
    """Every row's number and what is made of it; at the end, all faulty rows are one error: a count, and the first few
    named.
    """
    faults: list[AdapterError] = []
    count = faulty = 0
    for number, values in rows.numbered():
        count += 1
        try:
            made = make(Row(values, rows.place(number)))
        except AdapterError as error:
            faulty += 1
            faults = [*faults, error][:5]
        else:
            if not faulty:  # after a fault there is nothing to be had but its error
                yield number, made
    if faulty:
        more = f"\n  and {faulty - 5:,} more" if faulty > 5 else ""
        raise AdapterError(
            f"{rows.source}: {faulty:,} of {count:,} rows cannot be read as {what}; mend them or "
            "take them out:\n  " + "\n  ".join(str(fault) for fault in faults) + more
        )


def document(row: Row, shape: Shape, settings: PairsData) -> Document:
    """One row of that shape as a document."""
    if settings.prompt is not None and settings.completion is not None:
        return _pair(row, filled(settings.prompt, row), filled(settings.completion, row), settings)
    if shape == "messages":
        (column,) = _columns(row, shape)
        messages = turns_of(row.values[column], column, row.place)
        made = Document(row.place, messages=messages, tools=tools_of(row.values.get("tools"), row.place))
        return _until_last(made) if settings.learn == "last" else made
    if shape == "text":
        (column,) = _columns(row, shape)
        return Document(row.place, completion=text_of(row, column))
    if shape == "prompt-completion":
        prompt, completion = _columns(row, shape)
        return _pair(row, text_of(row, prompt), text_of(row, completion), settings)
    task, output, extra = _columns(row, shape)
    instruction = text_of(row, task)
    context = text_of(row, extra) if row.values.get(extra) is not None else ""
    if settings.chat:
        prompt = f"{instruction}\n\n{context}" if context else instruction
    elif context:
        prompt = ALPACA_WITH_INPUT.format(instruction, context)
    else:
        prompt = ALPACA.format(instruction)
    return _pair(row, prompt, text_of(row, output), settings)


def _until_last(document: Document) -> Document:
    """A chat up to the last of the assistant's turns, which alone is learned."""
    turns = [i for i, message in enumerate(document.messages) if message["role"] == "assistant"]
    return replace(document, messages=document.messages[: turns[-1] + 1], given=turns[-1]) if turns else document


def opening(text: str, settings: TextData) -> str | Chat:
    """What a person types as a prompt, as the rows of `settings.shape` write theirs."""
    if settings.shape == "messages":
        return Chat([{"role": "user", "content": text}])
    before, after = _around(settings)
    return f"{before}{text}{after}"


def typed(prompt: str | Sequence[Message], settings: TextData) -> str:
    """What a person would have to type for this prompt; of a chat, its last message."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    before, after = _around(settings)
    return text.removeprefix(before).removesuffix(after)


def _around(settings: TextData) -> tuple[str, str]:
    """What stands before and after the one text of a prompt; nothing, where a prompt has more than one."""
    template = settings.prompt or ""
    if settings.prompt is None and settings.shape == "alpaca" and not settings.chat:
        template = ALPACA.replace("{}", "{instruction}")
    match template_parts(template):
        case ((before, str()),):
            return before, ""
        case ((before, str()), (after, None)):
            return before, after
    return "", ""


def without_completions(rows: Rows, settings: PairsData) -> Rows:
    """Rows of prompts alone: the columns that only a completion needs are filled with nothing where they lack."""
    asked = {column for _, column in template_parts(settings.prompt or "")}
    needed = {column for _, column in template_parts(settings.completion or "") if column} - asked

    def filled() -> Iterator[tuple[int, Values]]:
        wanted = set(needed)
        for number, values in rows.numbered():
            for shape, choices in COLUMNS.items():
                if settings.prompt is None and shape in (settings.shape, "alpaca", "prompt-completion"):
                    wanted |= {c[1] for c in choices if len(c) > 1 and c[0] in values}
            yield number, values | dict.fromkeys(wanted - values.keys(), "")

    return replace(rows, numbered=filled)


def _pair(row: Row, prompt: str, completion: str, settings: PairsData) -> Document:
    if not settings.chat:
        return Document(row.place, prompt, completion)
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return Document(row.place, messages=turns)


def _columns(row: Row, shape: Shape) -> tuple[str, ...]:
    """The row's own names for the columns of the shape."""
    choices = COLUMNS[shape]
    for columns in choices:
        if all(column in row.values for column in columns[:2]):
            return columns
    closest = max(choices, key=lambda columns: sum(column in row.values for column in columns[:2]))
    raise _no_column(row, next(column for column in closest[:2] if column not in row.values))


def _no_column(row: Row, column: str) -> AdapterError:
    hint = nearest(column, row.values)
    return AdapterError(f"{row.place}: no column {column!r}; the columns are {listed(row.values)}{hint}")


def text_of(row: Row, column: str) -> str:
    """The row's value as text. Numbers are written out; nothing else that is not text passes."""
    if column not in row.values:
        raise _no_column(row, column)
    value = row.values[column]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and value == value:
        return str(value)
    raise AdapterError(f"{row.place}: {column!r} is {kind_of(value)}, expected text")


def filled(template: str, row: Row) -> str:
    """The template with the row's columns in their places."""
    return "".join(text if column is None else text + text_of(row, column) for text, column in template_parts(template))
