"""Tokens: a row begins with exactly what a model is given to generate from, and is learned exactly from there."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example as for_example
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from veneer.core.errors import AdapterError
from veneer.train.data.rows import Row
from veneer.train.language import tokens
from veneer.train.language.report import reported
from veneer.train.language.settings import LanguageData
from veneer.train.language.shapes import Document, document
from veneer.train.language.tokens import coloured, encode_prompt, unpacked

SENTENCES = ["The cat sat on the mat, said the user.", "Hello there: answer the question!\n\n", "12 345 cafés [INST]"]
CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only users and assistants') }}{% endif %}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
UNSTABLE = "{{ messages|length }}\n" + CHATML
MARKED = (
    "{{ messages|length }}\n{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama-2": LLAMA_2, "bare": BARE}
KINDS = ("bytes", "bytes-bos", "metaspace", "legacy")


@cache
def tokenizer_of(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A small genuine tokenizer: byte-level (trimmed offsets with a bos, as Llama 3), or of the Llama-2 family."""
    byte_level = kind.startswith("bytes")
    made = Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token=None if byte_level else "<unk>"))
    specials = ["<unk>", "<s>", "</s>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    if byte_level:
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    elif kind == "metaspace":
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    specials += [] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(SENTENCES * 5, trainer)
    if kind != "bytes":
        bos = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
        made.post_processor = processors.Sequence([made.post_processor, bos]) if byte_level else bos
    made.add_special_tokens([AddedToken(special, special=True) for special in specials[:5]])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def settings_of(**keys: object) -> LanguageData:
    return LanguageData.model_validate({"path": "t.jsonl", **keys})


def chat(*contents: str, first: str = "user") -> Document:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    messages = tuple({"role": roles[turn % 2], "content": content} for turn, content in enumerate(contents))
    return Document("t.jsonl, line 1", messages=messages)


def plain(prompt: str, completion: str, line: int = 1) -> Document:
    return Document(f"t.jsonl, line {line}", prompt, completion)


def encode(made: list[Document], tokenizer: PreTrainedTokenizerFast, said: LanguageData):
    """The documents that are used, as examples, and the report."""
    encoded = list(tokens.encode(made, tokenizer, said))
    table = [(len(one.ids), one.learned.count(1), one.length, one.fate) for one in encoded]
    rows = np.array(table, [(name, "i4") for name in ("tokens", "learned", "length", "fate")])
    report = reported(rows, rows["tokens"], lambda row: made[row].place, said)
    return [unpacked(one.packed(), row) for row, one in enumerate(encoded) if one.ids], report


def learned_text(made: Document, tokenizer: PreTrainedTokenizerFast, **keys: object) -> list[str]:
    (example,), _ = encode([made], tokenizer, settings_of(**keys))
    return [text for text, learned in coloured(example, tokenizer) if learned]


PARTS = [*" \n\tatTh.,:12'é猫🙂[]", "the ", " the", "  ", "\n\n", "e\u0301"]
WORDS = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@settings(max_examples=60, deadline=None)
@given(prompt=WORDS, completion=WORDS.filter(str.strip), kind=st.sampled_from(KINDS))
@for_example(prompt="", completion=" a", kind="bytes")  # a blank whose place is trimmed to nothing
@for_example(prompt="the ", completion="猫", kind="bytes")
@for_example(prompt="the:", completion=": cat", kind="legacy")  # a token may lie across the border
def test_law_a_plain_row_is_its_prompt_and_then_what_is_learned(prompt: str, completion: str, kind: str):
    tokenizer = tokenizer_of(kind)
    (example,), report = encode([plain(prompt, completion)], tokenizer, settings_of())
    given_ids = encode_prompt(prompt, tokenizer, settings_of())
    assert list(example.ids[: len(given_ids)]) == given_ids
    assert example.learned == bytes(len(given_ids)) + b"\1" * (len(example.ids) - len(given_ids))
    assert example.ids[-1] == tokenizer.eos_token_id
    assert (example.ids[0] == tokenizer.bos_token_id) == (kind != "bytes")
    assert report.learned == sum(example.learned)


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(WORDS.filter(str.strip), min_size=2, max_size=6),
    kind=st.sampled_from(KINDS),
    template=st.sampled_from(list(TEMPLATES.values())),
)
def test_law_a_chat_is_learned_from_where_the_assistant_speaks(contents: list[str], kind: str, template: str):
    tokenizer = tokenizer_of(kind, template)
    made = chat(*contents)
    (example,), _ = encode([made], tokenizer, settings_of())
    given_ids = encode_prompt(made.opening, tokenizer, settings_of())
    assert list(example.ids[: len(given_ids)]) == given_ids
    assert example.learned.index(1) == len(given_ids)


@pytest.mark.parametrize("template", [CHATML, LLAMA_2])
@pytest.mark.parametrize("kind", KINDS)
def test_law_every_later_turn_also_begins_with_its_prompt(kind: str, template: str):
    tokenizer = tokenizer_of(kind, template)
    made = chat("the cat?", "the mat", "and  ", "12 cafés", "the user\n", "[there]")
    (example,), _ = encode([made], tokenizer, settings_of())
    for turn in (1, 3, 5):
        given_ids = encode_prompt(made.messages[:turn], tokenizer, settings_of())
        assert list(example.ids[: len(given_ids)]) == given_ids
        assert example.learned[len(given_ids) - 1 : len(given_ids) + 1] == b"\0\1"


@pytest.mark.parametrize(
    ("values", "shape", "keys"),
    [
        ({"text": "the cat"}, "text", {}),
        ({"question": "the cat?", "answer": "the mat"}, "prompt-completion", {}),
        ({"question": "the cat?", "answer": "the mat"}, "prompt-completion", {"chat": True}),
        ({"a": "cat", "b": "mat"}, "prompt-completion", {"prompt": "the {a}:", "completion": " the {b}"}),
        ({"instruction": "the cat", "input": "sat", "output": "the mat"}, "alpaca", {}),
        ({"instruction": "the cat", "output": "the mat"}, "alpaca", {"chat": True}),
        ({"conversations": [{"from": "human", "value": "cat"}, {"from": "gpt", "value": "mat"}]}, "messages", {}),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_law_for_every_shape(values: dict, shape: str, keys: dict, kind: str):
    tokenizer, said = tokenizer_of(kind, CHATML), settings_of(**keys)
    made = document(Row(values, "t.jsonl, line 1"), shape, said)
    (example,), _ = encode([made], tokenizer, said)
    given_ids = encode_prompt(made.opening, tokenizer, said)
    assert list(example.ids[: len(given_ids)]) == given_ids
    assert example.learned.index(1) == len(given_ids)
    if keys.get("chat"):
        assert encode_prompt(made.messages[0]["content"], tokenizer, said) == given_ids


def test_what_is_learned_is_the_completion_and_the_stop():
    tokenizer = tokenizer_of("bytes-bos", CHATML)
    assert learned_text(plain("the cat", " é🙂"), tokenizer) == [" é🙂</s>"]
    assert learned_text(plain("", "the cat "), tokenizer) == ["the cat </s>"]
    assert learned_text(chat("a", "the mat", "b", "cat"), tokenizer) == ["the mat<|end|>", "cat<|end|>"]
    assert learned_text(plain(" a", " cat"), tokenizer, learn="all") == [" a cat</s>"]
    assert learned_text(chat("a", "b"), tokenizer, learn="all") == [
        "<|start|>user\na<|end|>\n<|start|>assistant\nb<|end|>\n"
    ]
    llama = tokenizer_of("legacy", LLAMA_2)
    assert [text.strip() for text in learned_text(chat("a", "the mat", "b", "cat"), llama)] == [
        "the mat </s>",
        "cat </s>",
    ]


def test_a_chat_whose_template_has_no_stop_ends_with_eos():
    tokenizer = tokenizer_of("bytes", BARE)
    assert learned_text(chat("a", "the mat"), tokenizer) == ["assistant: the mat\n</s>"]
    assert learned_text(chat("a", "the mat", "b"), tokenizer) == ["assistant: the mat\n"]


@pytest.mark.parametrize("contents", [("a", "the mat"), ("a", "the mat", "é", "🙂 cat")])
def test_a_template_that_rewrites_earlier_turns_is_read_by_its_marks_or_refused(contents: tuple[str, ...]):
    marked = learned_text(chat(*contents), tokenizer_of("bytes-bos", MARKED))
    assert marked == [f"{content}<|end|>" for content in contents[1::2]]
    unstable = tokenizer_of("bytes", UNSTABLE)
    with pytest.raises(AdapterError, match=r"t.jsonl, line 1: cannot tell which part .* data.learn=all"):
        encode([chat(*contents)], unstable, settings_of())
    assert learned_text(chat(*contents), unstable, learn="all")[0].startswith(f"{len(contents)}\n")


def test_chats_that_cannot_be_written_are_errors():
    with pytest.raises(AdapterError, match=r"line 1: the tokenizer has no chat template: .* data.prompt"):
        encode([chat("a", "b")], tokenizer_of("bytes"), settings_of())
    system = Document("t.jsonl, line 1", messages=({"role": "system", "content": "a"}, *chat("a", "b").messages))
    with pytest.raises(AdapterError, match=r"line 1: .*refuses this chat: only users and assistants"):
        encode([system], tokenizer_of("bytes", LLAMA_2), settings_of())
    with pytest.raises(AdapterError, match="the chat begins with the assistant"):
        encode([chat("a", "b", first="assistant")], tokenizer_of("bytes", CHATML), settings_of())


def test_a_tokenizer_without_eos_is_refused():
    made = tokenizer_of("bytes").backend_tokenizer
    with pytest.raises(AdapterError, match="no eos_token"):
        encode([plain("a", "b")], PreTrainedTokenizerFast(tokenizer_object=made), settings_of())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", range(2, 20))
def test_a_long_row_is_cut_and_never_to_nothing(kind: str, limit: int):
    tokenizer = tokenizer_of(kind)
    (whole,), _ = encode([plain("the cat sat on 12", " the 34")], tokenizer, settings_of())
    (example,), report = encode([plain("the cat sat on 12", " the 34")], tokenizer, settings_of(max_length=limit))
    assert len(example.ids) == min(limit, len(whole.ids)) == len(example.learned)
    assert 1 in example.learned[1:]
    assert (example.ids[0] == tokenizer.bos_token_id) == (kind != "bytes")
    assert report.cut.count == (len(whole.ids) > limit)
    assert report.lengths[0] == len(whole.ids)
    begins = whole.learned.index(1)
    if limit > begins:  # part of the completion is within the limit: the end goes
        assert example.ids == whole.ids[:limit]
    else:  # the start of the prompt goes, and the completion stays as far as it fits
        kept = sum(example.learned)
        assert example.ids[-kept:] == whole.ids[begins : begins + kept]
        assert kept == min(len(whole.ids) - begins, limit - (kind != "bytes"))


def test_long_rows_are_dropped_or_refused_when_that_is_said():
    tokenizer = tokenizer_of("bytes", CHATML)
    made = [plain("a", " the cat" * (10 if line == 3 else 1), line) for line in (1, 2, 3)]
    examples, report = encode(made, tokenizer, settings_of(max_length=9, too_long="drop"))
    assert ([example.row for example in examples], report.dropped.count) == ([0, 1], 1)
    with pytest.raises(AdapterError, match=r"1 of 3 rows are longer than data.max_length=9 \(t.jsonl, line 3, .*cut"):
        encode(made, tokenizer, settings_of(max_length=9, too_long="error"))
    with pytest.raises(AdapterError, match="so no row is left"):
        encode([chat("the cat " * 9, "a")], tokenizer, settings_of(max_length=8))


def test_rows_with_nothing_to_learn_are_counted_and_all_of_them_are_an_error():
    tokenizer = tokenizer_of("bytes", CHATML)
    empty = [plain("a", "", 1), plain("", " \n", 2), chat("a"), chat("a", " ")]
    examples, report = encode([*empty, plain("a", "b", 5)], tokenizer, settings_of())
    assert [example.row for example in examples] == [4]
    assert (report.rows, report.kept, report.left_out.count) == (5, 1, 4)
    with pytest.raises(
        AdapterError, match=r"none of the 4 rows has anything to learn \(t.jsonl, line 1; .* and 1 more"
    ):
        encode(empty, tokenizer, settings_of())
    assert len(encode([plain("a", ""), chat("a")], tokenizer, settings_of(learn="all"))[0]) == 2


def test_the_report_is_said_in_sentences():
    tokenizer = tokenizer_of("bytes")
    rows = [plain("a", " b" * size, size) for size in range(1, 101)]
    examples, report = encode([*rows, plain("a", "", 101)], tokenizer, settings_of(max_length=100))
    assert report.tokens == sum(len(example.ids) for example in examples)
    assert [report.length(share) for share in (0, 0.5, 1)] == [4, 104, 202]
    said = "\n".join(report.sentences())
    assert "100 of 101 rows are used" in said
    assert "Rows longer than data.max_length=100 and cut: 51 (t.jsonl, line 50, 102 tokens; " in said
    assert "Rows without anything to learn and left out: 1 (t.jsonl, line 101)." in said
    assert "dropped" not in said


@settings(max_examples=40, deadline=None)
@given(prompt=WORDS, completion=WORDS.filter(str.strip), kind=st.sampled_from(KINDS), data=st.data())
def test_colours_are_the_whole_text_in_runs(prompt: str, completion: str, kind: str, data: st.DataObject):
    tokenizer = tokenizer_of(kind)
    (example,), _ = encode([plain(prompt, completion)], tokenizer, settings_of())
    flags = data.draw(st.lists(st.booleans(), min_size=len(example.ids), max_size=len(example.ids)))
    example.learned = bytes(flags)  # any flags, so that runs begin in the middle of a character too
    runs = coloured(example, tokenizer)
    whole = tokenizer.decode(list(example.ids), clean_up_tokenization_spaces=False)
    assert "".join(text for text, _ in runs) == whole
    assert all(one[1] != two[1] for one, two in pairwise(runs))


def test_many_rows_give_what_each_gives_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("veneer.train.language.tokens.BATCH", 3)
    tokenizer = tokenizer_of("metaspace", CHATML)
    rows = [plain("the cat ", "12"), plain("the", " mat"), chat("a", "b"), plain("", "said"), plain("the", " mat")]
    together, _ = encode(rows, tokenizer, settings_of())
    alone = [encode([row], tokenizer, settings_of())[0][0] for row in rows]
    assert [(e.ids, e.learned) for e in together] == [(e.ids, e.learned) for e in alone]
    assert [e.row for e in together] == list(range(5))
