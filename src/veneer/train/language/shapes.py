"""Rows become documents: what is the prompt, the completion, the chat, and in a chat the assistant's part."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from veneer.core.errors import AdapterError, listed, nearest
from veneer.train.language.chat import Message
from veneer.train.language.rows import Row, Rows, Values
from veneer.train.language.settings import LanguageData, Shape, template_parts

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
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
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
    """One row, ready for a tokenizer: a plain prompt and completion, or the messages of a chat."""

    place: str
    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def opening(self) -> str | list[Message]:
        """What a model is given to generate from: the prompt, or all before the first assistant turn."""
        if not self.messages:
            return self.prompt
        roles = [message["role"] for message in self.messages]
        return list(self.messages[: roles.index("assistant") if "assistant" in roles else None])

    @property
    def key(self) -> str:
        """What documents with the same prompt share; for plain text, which has no prompt, the text."""
        opening = self.opening or self.completion or list(self.messages)
        return opening if isinstance(opening, str) else json.dumps(opening)

    def packed(self) -> bytes:
        """All but the place, as bytes."""
        turns = [[message["role"], message["content"]] for message in self.messages]
        return json.dumps([self.prompt, self.completion, *turns], ensure_ascii=False).encode("utf-8", "surrogatepass")

    @classmethod
    def unpacked(cls, packed: bytes, place: str) -> "Document":
        """What `packed` made bytes of."""
        prompt, completion, *turns = json.loads(packed.decode("utf-8", "surrogatepass"))
        return cls(place, prompt, completion, tuple({"role": role, "content": content} for role, content in turns))


def detect_shape(rows: Rows, settings: LanguageData) -> Shape:
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


def documents(rows: Rows, shape: Shape, settings: LanguageData) -> Iterator[tuple[int, Document]]:
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


def document(row: Row, shape: Shape, settings: LanguageData) -> Document:
    """One row of that shape as a document."""
    if settings.prompt is not None and settings.completion is not None:
        return _pair(row, _filled(settings.prompt, row), _filled(settings.completion, row), settings)
    if shape == "messages":
        (column,) = _columns(row, shape)
        return Document(row.place, messages=_messages(row, column))
    if shape == "text":
        (column,) = _columns(row, shape)
        return Document(row.place, completion=_text(row, column))
    if shape == "prompt-completion":
        prompt, completion = _columns(row, shape)
        return _pair(row, _text(row, prompt), _text(row, completion), settings)
    task, output, extra = _columns(row, shape)
    instruction = _text(row, task)
    context = _text(row, extra) if row.values.get(extra) is not None else ""
    if settings.chat:
        prompt = f"{instruction}\n\n{context}" if context else instruction
    elif context:
        prompt = ALPACA_WITH_INPUT.format(instruction, context)
    else:
        prompt = ALPACA.format(instruction)
    return _pair(row, prompt, _text(row, output), settings)


def opening(text: str, settings: LanguageData) -> str | list[Message]:
    """What a person types as a prompt, as the rows of `settings.shape` write theirs."""
    if settings.shape == "messages":
        return [{"role": "user", "content": text}]
    before, after = _around(settings)
    return f"{before}{text}{after}"


def typed(prompt: str | Sequence[Message], settings: LanguageData) -> str:
    """What a person would have to type for this prompt; of a chat, its last message."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    before, after = _around(settings)
    return text.removeprefix(before).removesuffix(after)


def _around(settings: LanguageData) -> tuple[str, str]:
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


def without_completions(rows: Rows, settings: LanguageData) -> Rows:
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


def _pair(row: Row, prompt: str, completion: str, settings: LanguageData) -> Document:
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


def _text(row: Row, column: str) -> str:
    """The row's value as text. Numbers are written out; nothing else that is not text passes."""
    if column not in row.values:
        raise _no_column(row, column)
    value = row.values[column]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and value == value:
        return str(value)
    raise AdapterError(f"{row.place}: {column!r} is {_kind(value)}, expected text")


def _kind(value: object) -> str:
    return "null" if value is None or value != value else f"a {type(value).__name__}"


def _filled(template: str, row: Row) -> str:
    """The template with the row's columns in their places."""
    return "".join(text if column is None else text + _text(row, column) for text, column in template_parts(template))


def _messages(row: Row, column: str) -> tuple[Message, ...]:
    """The turns of a chat, written as role and content or as from and value."""
    turns = row.values[column]
    if not isinstance(turns, Iterable) or isinstance(turns, str | Mapping):
        raise AdapterError(f"{row.place}: {column!r} is {_kind(turns)}, expected a list of messages")
    return tuple(_message(turn, f"{row.place}, message {number}") for number, turn in enumerate(turns, 1))


def _message(turn: object, place: str) -> Message:
    if not isinstance(turn, dict):
        raise AdapterError(f"{place}: {_kind(turn)}, expected an object with 'role' and 'content'")
    values: Values = turn
    said_by, said = ("from", "value") if "role" not in values and "from" in values else ("role", "content")
    role = values.get(said_by)
    if str(role) not in ROLES:
        hint = nearest(str(role), ROLES)
        raise AdapterError(f"{place}: {said_by!r} is {role!r}, expected one of {listed(ROLES)}{hint}")
    if values.get("tool_calls"):
        raise AdapterError(f"{place}: tool calls cannot be learned from; expected 'content' alone")
    return {"role": ROLES[str(role)], "content": _text(Row(values, place), said)}
