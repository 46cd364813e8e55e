"""Prepared rows: the same as rows held in memory, at the first start and at the second, which makes nothing anew."""

import gzip
import json
from collections import Counter
from functools import partial
from hashlib import blake2b
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from veneer.core.errors import AdapterError
from veneer.train.language import sources
from veneer.train.language import tokens as tokens_of_rows
from veneer.train.language.parts import Part, Question, questions, read_documents, tokenised
from veneer.train.language.settings import LanguageData
from veneer.train.language.shapes import Document
from veneer.train.language.tokens import BATCH, CHARACTERS, encode
from veneer.train.task import Reporter

ROWS = [
    {"prompt": f"inn {i % 70}\n", "completion": f"It is é🙂 {'pub ' * (i % 9)}" if i % 13 else " "} for i in range(300)
]


class Heard(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.seen: list[tuple[str, int, int]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, what: str, done: int, total: int) -> None:
        self.seen.append((what, done, total))


def tokenizer_of(end: str = "<end>") -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(alphabet, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end)
    fast.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    fast.chat_template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    return fast


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return file


def prepared(path: Path, seed: int = 0, reporter: Reporter | None = None, **keys: object) -> list[Part]:
    reporter = reporter or Reporter()
    data = LanguageData.model_validate({"path": str(path), "eval_share": 0.2, **keys})
    sides = read_documents(data, seed, reporter)
    return [tokenised(side, tokenizer_of(), data, reporter) for side in sides if side]


def kinds(cache: Path) -> dict[str, int]:
    """How many stores there are of each kind."""
    return dict(Counter(folder.name.partition("-")[0] for folder in cache.iterdir() if folder.is_dir()))


def in_memory(seed: int, share: float, limit: int) -> list[dict]:
    """What becomes of ROWS, all of them held at once and taken one by one."""
    tokenizer = tokenizer_of()
    sides = []
    for held in (False, True):
        rows = [(f"rows.jsonl, line {2 * i + 1}", row) for i, row in enumerate(ROWS)]
        rows = [(place, row) for place, row in rows if (drawn(row["prompt"], seed) < share) == held]
        examples, lengths, asked, cut, left_out = [], [], {}, [], []
        for at, (place, row) in enumerate(rows):
            if not row["completion"].strip():
                left_out.append(place)
                continue
            ids = [*tokenizer(row["prompt"] + row["completion"]).input_ids, tokenizer.eos_token_id]
            begins = len(tokenizer(row["prompt"]).input_ids)
            flags = bytes(begins) + b"\1" * (len(ids) - begins)
            examples.append((place, at, ids[:limit], flags[:limit]))
            lengths.append(len(ids))
            asked.setdefault(row["prompt"], []).append(row["completion"].strip())
            if len(ids) > limit:
                cut.append(f"{place}, {len(ids)} tokens")
        counts = [sum(len(ids) for *_, ids, _ in examples), sum(sum(flags) for *_, flags in examples)]
        sentences = [
            f"{len(examples)} of {len(rows)} rows are used: {counts[0]:,} tokens, {counts[1]:,} of them learned.",
            f"Rows longer than data.max_length={limit} and cut: {told(cut)}.",
            f"Rows without anything to learn and left out: {told(left_out)}.",
        ]
        sides.append({"examples": examples, "lengths": sorted(lengths), "asked": asked, "sentences": sentences})
    return sides


def told(places: list[str]) -> str:
    return f"{len(places)} ({'; '.join(places[:3])} and {len(places) - 3} more)"


def drawn(key: str, seed: int) -> float:
    return int.from_bytes(blake2b(key.encode(), digest_size=6, salt=str(seed).encode()).digest()) / 2**48


def expect_the_same(parts: list[Part], sides: list[dict]) -> None:
    for part, side in zip(parts, sides, strict=True):
        examples = part.examples
        found = [(part.place(i), e.row, list(e.ids), e.learned) for i, e in enumerate(examples)]
        assert found == side["examples"]
        assert examples.lengths.tolist() == [len(ids) for *_, ids, _ in side["examples"]]
        assert list(part.report.lengths) == side["lengths"]
        assert {q.document.key: q.references for q in questions(part)} == side["asked"]
        assert [q.document.key for q in questions(part)] == list(side["asked"])
        said = part.report.sentences()
        assert [said[0], *said[2:]] == side["sentences"]


@pytest.mark.parametrize("seed", [0, 5])
def test_prepared_rows_are_those_held_in_memory_at_every_start(path: Path, seed: int):
    expected = in_memory(seed, 0.2, 30)
    for _ in range(2):
        expect_the_same(prepared(path, seed, max_length=30), expected)


def test_the_second_start_neither_reads_nor_tokenises(path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = Heard(), Heard()
    prepared(path, reporter=first, max_length=30)
    for module, name in ((sources.shapes, "document"), (tokens_of_rows, "_passages"), (sources.rows, "draw")):
        monkeypatch.setattr(module, name, None)
    expect_the_same(prepared(path, reporter=second, max_length=30), in_memory(0, 0.2, 30))
    assert [said.partition(" in ")[0] for said in first.said] == ["rows: tokenised"]
    assert [said.partition(" /")[0] for said in second.said] == ["rows: the tokens are read from the cache,"]
    assert first.seen[-1] == ("rows: tokenising", len(ROWS), len(ROWS))
    assert second.seen == []


def test_what_changes_decides_what_is_made_anew(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    prepared(path)
    for keys, made in [
        ({}, {"documents": 1, "draws": 1, "tokens": 1}),
        ({"eval_share": 0.5}, {"documents": 1, "draws": 1, "tokens": 1}),
        ({"shape": "prompt-completion"}, {"documents": 1, "draws": 1, "tokens": 1}),
        ({"seed": 1}, {"documents": 1, "draws": 2, "tokens": 1}),
        ({"max_length": 30}, {"documents": 1, "draws": 2, "tokens": 2}),
        ({"learn": "all"}, {"documents": 1, "draws": 2, "tokens": 3}),
        ({"chat": True}, {"documents": 2, "draws": 3, "tokens": 4}),
        ({"prompt": "{prompt}", "completion": "{completion}!"}, {"documents": 3, "draws": 4, "tokens": 5}),
    ]:
        prepared(path, **keys)
        assert kinds(cache) == made, keys
    monkeypatch.setitem(globals(), "tokenizer_of", partial(tokenizer_of, "<stop>"))
    prepared(path)
    assert kinds(cache) == {"documents": 3, "draws": 4, "tokens": 6}
    renamed = path.rename(path.with_name("other.jsonl"))
    assert prepared(renamed)[0].place(0) == "other.jsonl, line 3"
    assert kinds(cache) == {"documents": 3, "draws": 4, "tokens": 6}
    renamed.write_text(renamed.read_text(encoding="utf-8").replace("inn 1", "inn_1"), encoding="utf-8")
    assert prepared(renamed)[0].documents[0].prompt == "inn_1\n"
    assert kinds(cache) == {"documents": 4, "draws": 5, "tokens": 7}
    monkeypatch.setattr(sources, "program", lambda names: "another")
    prepared(renamed)
    assert kinds(cache) == {"documents": 5, "draws": 6, "tokens": 8}


def test_a_template_that_writes_the_date_is_another_one_tomorrow(monkeypatch: pytest.MonkeyPatch):
    def of(template: str, day: str) -> str:
        monkeypatch.setattr(sources.time, "strftime", lambda form: day)
        tokenizer = tokenizer_of()
        tokenizer.chat_template = template
        return sources.fingerprint(tokenizer)

    assert of("{{ messages }}", "one") == of("{{ messages }}", "two")
    assert of("{{ strftime_now('%d') }}", "one") != of("{{ strftime_now('%d') }}", "two")


def test_faulty_rows_leave_nothing_and_are_told_at_every_start(path: Path, cache: Path):
    path.write_text(path.read_text(encoding="utf-8") + '\n{"prompt": "a", "completion": null}', encoding="utf-8")
    for _ in range(2):
        with pytest.raises(
            AdapterError, match=r"1 of 301 rows cannot be read .*\n  rows.jsonl, line 600: 'completion'"
        ):
            prepared(path)
        assert kinds(cache) == {}
    path.write_text('{"prompt": "a", "completion": ""}', encoding="utf-8")
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"none of the 1 rows has anything to learn \(rows.jsonl, line 1\)"):
            prepared(path)


def test_a_file_that_changes_while_it_is_read_is_refused(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    made = sources.shapes.document

    def document(row, shape, settings):
        if row.place.endswith("line 9"):
            with path.open("a", encoding="utf-8") as lines:
                lines.write("\n" + json.dumps(ROWS[0]))
        return made(row, shape, settings)

    monkeypatch.setattr(sources.shapes, "document", document)
    with pytest.raises(AdapterError, match=r"rows.jsonl was changed while it was read; nothing is kept"):
        prepared(path)
    assert kinds(cache) == {}


def test_a_chat_and_any_text_come_back_as_they_were(tmp_path: Path):
    said = [
        {"role": role, "content": content}
        for role, content in [("system", "é\0"), ("user", "\u2028"), ("assistant", "🙂")]
    ]
    path = tmp_path / "chats.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"messages": said}).encode()))
    (part,) = prepared(path)
    assert part.documents[0] == Document("chats.jsonl.gz, line 1", messages=tuple(said))
    assert questions(part) == [Question(part.documents[0], ["🙂"])]
    lone = Document("t", "\ud800", "b")
    assert Document.unpacked(lone.packed(), "t") == lone


@pytest.mark.parametrize(("size", "most"), [(1, BATCH), (CHARACTERS // 4, 5)])
def test_a_few_documents_are_held_at_once(size: int, most: int):
    taken = 0

    def stream():
        nonlocal taken
        for _ in range(3 * BATCH if size == 1 else 12):
            taken += 1
            yield Document("t", "", "a" * size)

    tokens = encode(stream(), tokenizer_of(), LanguageData(path="-", max_length=8))
    for done, _ in enumerate(tokens):
        assert taken - done <= most
