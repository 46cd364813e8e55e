"""Chats of four families' templates: exactly the assistant's turns are learned, each with its end-of-turn token."""

import json
from itertools import groupby

import pytest

from train.language.bases import tokenizer_with
from train.language.templates import QWEN_3, TEMPLATES, WORDS, plain
from veneer.core.errors import AdapterError
from veneer.train.data.rows import Row
from veneer.train.language.settings import LanguageData
from veneer.train.language.shapes import Document, document
from veneer.train.language.tokens import encode, encode_prompt, unpacked

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "rooms",
            "description": "Free rooms of an inn.",
            "parameters": {"type": "object", "properties": {"inn": {"type": "string"}}, "required": ["inn"]},
        },
    }
]
SYSTEM = {"role": "system", "content": "Name inns only."}
QUESTIONS = [{"role": "user", "content": text} for text in ("Name an inn.", "Another one?", "What is 12 + 30?")]
ANSWERS = [{"role": "assistant", "content": text} for text in ("The Golden Inn.", "The mat, said she.", "It is 42.")]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "rooms", "arguments": {"inn": "The Golden Inn"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "rooms", "tool_call_id": "abcdefghi", "content": "12 rooms"}


def turns(count: int) -> list:
    return [turn for pair in zip(QUESTIONS[:count], ANSWERS[:count], strict=True) for turn in pair]


CASES = {
    "one turn": (turns(1), []),
    "two turns": (turns(2), []),
    "three turns": (turns(3), []),
    "a question left open": ([*turns(2), QUESTIONS[2]], []),
    "system": ([SYSTEM, *turns(1)], []),
    "system, three turns": ([SYSTEM, *turns(3)], []),
    "tools": (turns(1), TOOLS),
    "a call": ([QUESTIONS[0], CALLING], TOOLS),
    "a call and its result": ([QUESTIONS[0], CALLING, RESULT, ANSWERS[1]], TOOLS),
    "two calls": ([QUESTIONS[0], CALLING, RESULT, CALLING, RESULT, ANSWERS[1]], TOOLS),
    "system, a call, and another turn": ([SYSTEM, QUESTIONS[0], CALLING, RESULT, *ANSWERS[:1], *turns(2)], TOOLS),
}
ANEW = {("mistral", "system, three turns"), ("mistral", "system, a call, and another turn")}  # written anew each turn
NO_TOOLS = {"smollm-2"}


def encoded(chat: Document, tokenizer, **keys):
    (made,) = encode([chat], tokenizer, LanguageData(path="-", **keys))
    return unpacked(made.packed(), 0)


def of(messages: list, tools: list, **keys) -> Document:
    row = Row({"messages": messages, "tools": tools}, "t, line 1")
    return document(row, "messages", LanguageData(path="-", **keys))


def said(turn: dict, family: str) -> str:
    """What the assistant's turn is, written out by hand after the family's format."""
    if "tool_calls" not in turn:
        text = turn["content"]
    else:
        own = turn["tool_calls"][0]["function"]
        name, arguments = own["name"], json.dumps(own["arguments"])
        text = {
            "llama-3": f'{{"name": "{name}", "parameters": {arguments}}}',
            "qwen-2": f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>',
            "mistral": f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {arguments}, "id": "{CALL["id"]}"}}]',
        }[family]
    before = " " if family == "mistral" and "tool_calls" not in turn else ""
    return before + text + {"llama-3": "<|eot_id|>", "mistral": "</s>"}.get(family, "<|im_end|>")


@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for family in TEMPLATES for case in CASES if not (CASES[case][1] and family in NO_TOOLS)],
)
def test_law_the_assistants_turns_are_learned_and_nothing_else(family, case):
    messages, tools = CASES[case]
    tokenizer = tokenizer_with(WORDS, template=plain(TEMPLATES[family]))
    chat = of(messages, tools)
    if (family, case) in ANEW:
        with pytest.raises(AdapterError, match=r"t, line 1: cannot tell which part .* data.learn=last"):
            encoded(chat, tokenizer)
        return
    example = encoded(chat, tokenizer)
    text = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
    assert tokenizer.decode(example.ids) == text
    runs = [list(run) for flag, run in groupby(range(len(example.ids)), lambda i: example.learned[i]) if flag]
    learned = [tokenizer.decode(example.ids[run[0] : run[-1] + 1]) for run in runs]
    assert learned == [said(turn, family) for turn in messages if turn["role"] == "assistant"]
    prompt = encode_prompt(chat.opening, tokenizer, LanguageData(path="-"))
    assert list(example.ids[: len(prompt)]) == prompt
    assert runs[0][0] == len(prompt)
    marked = tokenizer_with(WORDS, template=TEMPLATES[family])
    whole = marked.apply_chat_template(
        messages, tools=tools or None, return_dict=True, return_assistant_tokens_mask=True
    )
    assert list(example.learned) == whole["assistant_masks"]
    assert list(example.ids) == whole["input_ids"]


@pytest.mark.parametrize(("family", "case"), sorted(ANEW))
def test_where_earlier_turns_are_written_anew_marks_help_or_the_last_turn_alone(family, case):
    messages, tools = CASES[case]
    marked = encoded(of(messages, tools), tokenizer_with(WORDS, template=TEMPLATES[family]))
    tokenizer = tokenizer_with(WORDS, template=plain(TEMPLATES[family]))
    chat = of([*messages, QUESTIONS[0]], tools, learn="last")  # what comes behind the last turn goes
    last = encoded(chat, tokenizer)
    assert list(chat.opening) == list(of(messages, tools).messages[:-1])
    assert marked.ids == last.ids
    begin = last.learned.index(1)
    assert set(last.learned[begin:]) == {1}
    assert tokenizer.decode(last.ids[begin:]) == said(messages[-1], family)
    assert last.learned[begin:] == marked.learned[begin:]
    assert 1 in marked.learned[:begin]


def test_thoughts_that_are_dropped_later_are_found_and_said():
    tokenizer = tokenizer_with(WORDS, template=QWEN_3)
    thought = [{**turn, "reasoning_content": "Let me see."} for turn in ANSWERS]
    one = encoded(of([QUESTIONS[0], thought[0]], []), tokenizer)
    begin = one.learned.index(1)
    assert tokenizer.decode(one.ids[begin:]).startswith("<think>\nLet me see.\n</think>\n\nThe Golden Inn.<|im_end|>")
    two = of([QUESTIONS[0], thought[0], QUESTIONS[1], thought[1]], [])
    with pytest.raises(AdapterError, match=r"writes earlier turns differently when more follow .* data.learn=last"):
        encoded(two, tokenizer)
    last = encoded(of(list(two.messages), [], learn="last"), tokenizer)
    begin = last.learned.index(1)
    assert tokenizer.decode(last.ids[:begin]).endswith(
        "The Golden Inn.<|im_end|>\n<|im_start|>user\nAnother one?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "Let me see." in tokenizer.decode(last.ids[begin:])


def test_tools_and_calls_may_be_json():
    """As OpenAI writes arguments, and as tables must write both."""
    written = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
    calling = {"role": "assistant", "content": None, "tool_calls": [written], "name": None}
    plainly = of([QUESTIONS[0], CALLING], TOOLS)
    as_json = Row({"messages": [QUESTIONS[0], calling], "tools": json.dumps(TOOLS)}, "t, line 1")
    assert document(as_json, "messages", LanguageData(path="-")) == plainly
    assert Document.unpacked(plainly.packed(), "t, line 1") == plainly


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tools": "[{"}, "'tools' are not valid JSON"),
        ({"tools": {"a": 1}}, "'tools' is a dict, expected a list"),
        ({"tools": ["rooms"]}, "the tool 'rooms' is a str, expected its JSON schema"),
        ({"call": {"function": {"arguments": {}}}}, "message 2: the tool call .* has no function with a name"),
        ({"call": {"function": {"name": "f", "arguments": "{"}}}, "message 2: the arguments of f are not valid JSON"),
        ({"call": {"function": {"name": "f", "arguments": [1]}}}, "message 2: the arguments of f are a list"),
    ],
)
def test_faulty_tools_are_named(values, message):
    calls = [values.get("call", CALL)]
    row = {"messages": [QUESTIONS[0], {**CALLING, "tool_calls": calls}], "tools": values.get("tools", TOOLS)}
    with pytest.raises(AdapterError, match=f"t, line 1.*{message}"):
        document(Row(row, "t, line 1"), "messages", LanguageData(path="-"))
