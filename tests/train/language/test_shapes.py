"""Shapes: found from the columns, or said; faulty rows are one error."""

import pytest
from pydantic import ValidationError

from veneer.core.errors import AdapterError
from veneer.train.data.rows import Rows
from veneer.train.language.settings import LanguageData
from veneer.train.language.shapes import Document, detect_shape, documents

CHAT = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})


def rows_of(*values: dict) -> Rows:
    return Rows("t.jsonl", "line", lambda: enumerate(values, 1), dict)


def settings_of(**keys: object) -> LanguageData:
    return LanguageData.model_validate({"path": "t.jsonl", **keys})


def read(*values: dict, **keys: object) -> list[Document]:
    rows, settings = rows_of(*values), settings_of(**keys)
    return [made for _, made in documents(rows, detect_shape(rows, settings), settings)]


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        ({"text": "a", "id": 1}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion"),
        ({"answer": "b", "question": "a", "text": "ab"}, "prompt-completion"),
        ({"article": "a", "summary": "b"}, "prompt-completion"),
        ({"input": "a", "output": "b"}, "prompt-completion"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "input": "", "output": "b", "text": "ab"}, "alpaca"),
        ({"instruction": "a", "context": "c", "response": "b"}, "alpaca"),
        ({"messages": [], "prompt": "a", "completion": "b"}, "messages"),
        ({"conversations": []}, "messages"),
    ],
)
def test_the_shape_is_found_from_the_columns(values: dict, shape: str):
    assert detect_shape(rows_of(values), settings_of()) == shape


def test_a_shape_that_is_said_wins():
    rows = rows_of({"text": "a", "prompt": "b", "completion": "c"})
    assert detect_shape(rows, settings_of(shape="text")) == "text"
    assert detect_shape(rows, settings_of(prompt="{text}", completion="{prompt}")) == "prompt-completion"


def test_columns_of_no_shape_are_an_error_that_shows_the_ways_out():
    with pytest.raises(AdapterError) as caught:
        detect_shape(rows_of({"headline": "a", "body": "b"}), settings_of())
    for part in ("t.jsonl", "'headline', 'body'", "question + answer", "data.shape=", "data.prompt="):
        assert part in str(caught.value)
    with pytest.raises(AdapterError, match=r"expected a prompt and a completion \(data.chat is set\)"):
        detect_shape(rows_of({"text": "a"}), settings_of(chat=True))


def test_plain_rows_become_prompt_and_completion():
    assert read({"text": "a"}) == [Document("t.jsonl, line 1", "", "a")]
    assert read({"question": "a?", "answer": 4}) == [Document("t.jsonl, line 1", "a?", "4")]
    (document,) = read({"x": "{y}", "the name": 2.5}, prompt="{{{x}}} {the name}:", completion=" {x}!")
    assert (document.prompt, document.completion) == ("{{y}} 2.5:", " {y}!")


def test_alpaca_has_its_two_wordings():
    bare, full = read({"instruction": "Add {1}", "output": "2"}, {"instruction": "I", "input": "C", "output": "O"})
    assert bare.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {1}\n\n### Response:\n"
    )
    assert "paired with an input" in full.prompt
    assert full.prompt.endswith("### Instruction:\nI\n\n### Input:\nC\n\n### Response:\n")
    assert (bare.completion, full.completion) == ("2", "O")


def test_chat_rows_become_messages():
    shared = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}
    (openai, sharegpt) = read({"messages": list(CHAT)}, {"conversations": list(shared)})
    assert openai.messages == sharegpt.messages == CHAT
    assert openai.opening == [CHAT[0]]
    assert openai.key == sharegpt.key
    for values in ({"prompt": "hi", "completion": "hello"}, {"instruction": "hi", "output": "hello"}):
        assert read(values, chat=True)[0].messages == CHAT
    (alpaca,) = read({"instruction": "I", "input": "C", "output": "O"}, chat=True)
    assert alpaca.messages[0]["content"] == "I\n\nC"


def test_the_key_is_the_prompt_or_the_text():
    one, two = read({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"})
    assert one.key == two.key == "a"
    assert read({"text": "a"})[0].key == "a"


@pytest.mark.parametrize(
    ("values", "keys", "message"),
    [
        ({"prompt": "a", "completion": None}, {}, "'completion' is null, expected text"),
        ({"prompt": "a", "completion": float("nan")}, {}, "'completion' is null, expected text"),
        ({"prompt": "a", "completion": ["b"]}, {}, "'completion' is a list, expected text"),
        ({"prompt": "a", "completio": "b"}, {"shape": "prompt-completion"}, "no column 'completion'.*mean 'completio'"),
        ({"facts": "a"}, {"prompt": "{fact}", "completion": "{facts}"}, "no column 'fact'.*did you mean 'facts'"),
        ({"messages": "a"}, {}, "'messages' is a str, expected a list"),
        ({"messages": None}, {}, "'messages' is null, expected a list"),
        ({"messages": ["a"]}, {}, "message 1: a str, expected an object"),
        ({"messages": [{"role": "asistant", "content": ""}]}, {}, "message 1: 'role' is 'asistant'.*'assistant'"),
        ({"messages": [CHAT[0], {"role": "user", "content": None}]}, {}, "message 2: 'content' is null"),
        ({"messages": [{"role": "user", "text": "a"}]}, {}, "message 1: no column 'content'"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
            {},
            "message 1: the tool call 1 has no function",
        ),
    ],
)
def test_a_faulty_row_is_named(values: dict, keys: dict, message: str):
    with pytest.raises(AdapterError, match=rf"1 of 1 rows cannot be read as .*\n  t.jsonl, line 1.*{message}"):
        read(values, **keys)


def test_faulty_rows_are_one_error_with_a_count():
    with pytest.raises(AdapterError) as caught:
        read({"text": "good"}, *[{"text": None}] * 1200)
    message = str(caught.value)
    assert "1,200 of 1,201 rows cannot be read as text" in message
    assert "line 6:" in message
    assert "line 7:" not in message
    assert message.endswith("and 1,195 more")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt": "a"}, "data.prompt is set and data.completion is not"),
        ({"completion": "a"}, "data.completion is set and data.prompt is not"),
        ({"prompt": "{a", "completion": ""}, "a literal brace is doubled"),
        ({"prompt": "{}", "completion": ""}, "a literal brace is doubled"),
        ({"prompt": "{a:3}", "completion": ""}, "a literal brace is doubled"),
        ({"prompt": "{a}", "completion": "{b}", "shape": "alpaca"}, "leave one of the two out"),
        ({"chat": True, "shape": "text"}, "data.chat needs a prompt"),
        ({"pth": "a"}, "Extra inputs"),
        ({"eval_share": 1}, "less than 1"),
    ],
)
def test_settings_that_contradict_are_refused(keys: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        settings_of(**keys)


def test_every_setting_says_what_it_is():
    assert all(field.description for field in LanguageData.model_fields.values())
