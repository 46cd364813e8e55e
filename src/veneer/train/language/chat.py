"""Chats as the tokenizer's own template writes them, and which part of them the assistant says."""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from veneer.core.errors import AdapterError
from veneer.train.language.turns import Message

Spans = list[tuple[int, int]]  # of characters: begin, end


def answer_spans(
    messages: Sequence[Message], text: str, tokenizer: Any, tools: Sequence[Any] = (), given: int = 0
) -> Spans | None:
    """Where the assistant's turns behind the `given` are in `text`, found by writing the chat up to them.

    None where that fails.
    """
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or turn < given:
            continue
        try:
            opening = rendered_chat(messages[:turn], tokenizer, tools, answering=True)
            ending = text if turn == len(messages) - 1 else rendered_chat(messages[: turn + 1], tokenizer, tools)
        except AdapterError:
            return None
        if not (text.startswith(ending) and ending.startswith(opening)):
            return None
        spans.append((len(opening), len(ending)))
    return spans


def marked_spans(messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any] = (), given: int = 0) -> Spans:
    """Where the assistant's turns behind the `given` are, by the template's own `{% generation %}`."""
    if not re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template()):
        raise AdapterError(
            "cannot tell which part of the chat is the assistant's: the tokenizer's chat template writes earlier "
            "turns differently when more follow (or the chat begins with the assistant), and marks no "
            "{% generation %}. Say data.learn=last (the last of the assistant's turns), or data.learn=all, give "
            "every row one user and one assistant turn, or choose another base"
        )
    marked = tokenizer.apply_chat_template(
        list(messages),
        tools=list(tools) or None,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    flagged = zip(marked["assistant_masks"], marked["offset_mapping"], strict=True)
    runs = [[place for _, place in run] for flag, run in groupby(flagged, key=lambda pair: pair[0]) if flag]
    before = sum(message["role"] == "assistant" for message in messages[:given])
    return [(run[0][0], run[-1][1]) for run in runs][before:]


def rendered_chat(
    messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any] = (), answering: bool = False
) -> str:
    """The chat as the tokenizer's template writes it; `answering` opens the assistant's next turn."""
    if not tokenizer.chat_template:
        raise AdapterError(
            "the tokenizer has no chat template: write the rows out with data.prompt and data.completion, or choose "
            "a base that was trained to chat"
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=answering
        )
    except Exception as error:  # a template is a program that came with the base: it may raise anything
        raise AdapterError(f"the tokenizer's chat template refuses this chat: {error}") from error
