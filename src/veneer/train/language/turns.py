"""The turns of a chat, and the tools that the assistant may call, as rows have them and as templates want them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from veneer.core.errors import AdapterError, listed, nearest

Message = dict[str, Any]  # role and content, and what else of MORE the row says

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
}
MORE = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")  # what templates read besides


class Chat(list[Message]):
    """The turns of a chat; `tools` are those that the assistant may call."""

    def __init__(self, turns: Iterable[Message], tools: Sequence[Any] = ()) -> None:
        super().__init__(turns)
        self.tools = tuple(tools)


def turns_of(value: object, column: str, place: str) -> tuple[Message, ...]:
    """The turns of a chat, written as role and content or as from and value."""
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
        raise AdapterError(f"{place}: {column!r} is {kind_of(value)}, expected a list of messages")
    return tuple(_turn(turn, f"{place}, message {number}") for number, turn in enumerate(value, 1))


def _turn(turn: object, place: str) -> Message:
    if not isinstance(turn, dict):
        raise AdapterError(f"{place}: {kind_of(turn)}, expected an object with 'role' and 'content'")
    said_by, said = ("from", "value") if "role" not in turn and "from" in turn else ("role", "content")
    role = turn.get(said_by)
    if str(role) not in ROLES:
        hint = nearest(str(role), ROLES)
        raise AdapterError(f"{place}: {said_by!r} is {role!r}, expected one of {listed(ROLES)}{hint}")
    more = {key: turn[key] for key in MORE if turn.get(key)}  # a table has every column in every turn
    if "tool_calls" in more:
        more["tool_calls"] = [_call(call, place) for call in _list(more["tool_calls"], "tool_calls", place)]
    content = turn.get(said)
    if content is None and "tool_calls" in more:
        content = ""
    return {"role": ROLES[str(role)], "content": _content(content, said, turn, place), **more}


def _content(content: object, said: str, turn: Message, place: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, int | float) and content == content:
        return str(content)
    if said not in turn:
        hint = nearest(said, turn)
        raise AdapterError(f"{place}: no column {said!r}; the columns are {listed(turn)}{hint}")
    raise AdapterError(f"{place}: {said!r} is {kind_of(content)}, expected text")


def _call(call: object, place: str) -> Message:
    """A call as templates want it: its arguments are an object, and not that object's JSON, as OpenAI writes it."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise AdapterError(f"{place}: the tool call {call!r:.80} has no function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{place}: the arguments of {function['name']}")
    if not isinstance(arguments, dict | None):
        raise AdapterError(f"{place}: the arguments of {function['name']} are {kind_of(arguments)}, expected an object")
    more = {"id": call["id"]} if isinstance(call, dict) and call.get("id") else {}
    return {"type": "function", **more, "function": {"name": function["name"], "arguments": arguments or {}}}


def tools_of(value: object, place: str) -> tuple[Any, ...]:
    """The tools of a row: a list of their JSON schemas, or that list as JSON."""
    if isinstance(value, str):
        value = _parsed(value, f"{place}: 'tools'") if value.strip() else None
    tools = _list(value, "tools", place) if value is not None else []
    if wrong := [tool for tool in tools if not isinstance(tool, dict)]:
        raise AdapterError(f"{place}: the tool {wrong[0]!r:.80} is {kind_of(wrong[0])}, expected its JSON schema")
    return tuple(tools)


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} are not valid JSON: {error}") from error


def _list(value: object, column: str, place: str) -> list[Any]:
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
        raise AdapterError(f"{place}: {column!r} is {kind_of(value)}, expected a list")
    return list(value)


def kind_of(value: object) -> str:
    return "null" if value is None or value != value else f"a {type(value).__name__}"
