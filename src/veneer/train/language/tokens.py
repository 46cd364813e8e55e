"""Documents become tokens, and each token knows whether it is learned.

A document is one text with a border: what comes before it is the prompt. The text is tokenised whole, as
inference does it elsewhere; where a token would lie across the border, its two sides are tokenised apart. So
a row's tokens begin with exactly the tokens that `encode_prompt` gives a model to generate from.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from veneer.core.errors import AdapterError
from veneer.train.language.chat import Spans, answer_spans, marked_spans, rendered_chat
from veneer.train.language.report import Fate
from veneer.train.language.settings import TextData
from veneer.train.language.shapes import Document
from veneer.train.language.turns import Message

BATCH = 1000  # texts a call: a fast tokenizer spreads them over the processor's cores
CHARACTERS = 1_000_000  # of a batch, about: a token takes some 200 bytes until it is written
TOKEN_BYTES = 5


@dataclass(slots=True)
class Example:
    """One row as tokens: their ids, a flag for each (odd: learned), and which of the documents it is."""

    ids: "array[int]"
    learned: bytes
    row: int


class Encoded(NamedTuple):
    """A row's ids and flags, none where it is not used; its length before it was cut; what became of it."""

    ids: list[int]
    learned: bytes
    length: int
    fate: Fate

    @property
    def units(self) -> int:
        """How many tokens are learned."""
        return sum(flag & 1 for flag in self.learned)

    def packed(self) -> bytes:
        """Ids and flags as bytes, five a token."""
        return array("i", self.ids).tobytes() + self.learned


def unpacked(packed: bytes, row: int) -> Example:
    """What `Encoded.packed` made bytes of."""
    ids, border = array("i"), len(packed) // TOKEN_BYTES * 4
    ids.frombytes(packed[:border])
    return Example(ids, packed[border:], row)


class Passage(NamedTuple):
    """A document as one text: where its prompt ends, which characters are learned, the ids around the text."""

    text: str
    border: int
    spans: Spans
    before: list[int]
    after: list[int]


class Tokens(NamedTuple):
    """The tokens of a passage: ids, flags, and which of them are those of the text before the border."""

    ids: list[int]
    learned: bytes
    prompt: range


def encode(documents: Iterable[Document], tokenizer: Any, settings: TextData) -> Iterator[Encoded]:
    """Each document as tokens; a few are held at once."""
    for batch in _batches(documents):
        passages = _passages(batch, tokenizer, settings)
        for document, tokens in zip(batch, _tokenised(passages, tokenizer), strict=True):
            yield _fitted(tokens, bool(document.messages), settings)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in runs of `BATCH`, fewer where they are long."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.prompt) + len(document.completion) + sum(len(m["content"]) for m in document.messages)
        if len(batch) == BATCH or size > CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_prompt(prompt: str | Sequence[Message], tokenizer: Any, settings: TextData) -> list[int]:
    """The tokens that come before the completion in training: what a model is given to generate from.

    `prompt` is a `Document.opening`: a text (put into the chat template where data.chat says so), or messages
    (a `Chat`, where there are tools).
    """
    if isinstance(prompt, str) and not settings.chat:
        passage = Passage(prompt, len(prompt), [], bos_of(tokenizer), [])
    else:
        chat: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        tools = getattr(chat, "tools", ())
        text = rendered_chat(chat, tokenizer, tools, answering=True)
        spans = answer_spans(chat, text, tokenizer, tools)
        passage = Passage(text, spans[0][0] if spans else len(text), [], [], [])
    return _tokenised([passage], tokenizer)[0].ids


def coloured(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The example as text, in runs of (text, learned); a character whose bytes two runs share is the later one's."""
    ids, runs, done = list(example.ids), [], 0
    borders = [i for i in range(1, len(ids)) if example.learned[i] != example.learned[i - 1]]
    for border in [*borders, len(ids)]:
        text = tokenizer.decode(ids[:border], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if border < len(ids):
            text = text.rstrip("\ufffd")  # how a decoder writes a character that is not whole yet
        runs.append((text[done:], bool(example.learned[border - 1])))
        done = max(done, len(text))
    return runs


def _fitted(tokens: Tokens, chat: bool, settings: TextData) -> Encoded:
    """Ids and flags, cut where they are too many."""
    ids, learned, prompt = tokens
    length = len(ids)
    if not _learnable(learned):
        return Encoded([], b"", length, Fate.LEFT_OUT)
    surplus = length - settings.max_length
    if surplus <= 0:
        return Encoded(ids, learned, length, Fate.KEPT)
    if not chat and not _learnable(learned[:-surplus]):
        begin, end = prompt.start, min(prompt.stop, prompt.start + surplus)
        ids, learned = ids[:begin] + ids[end:], learned[:begin] + learned[end:]
    ids, learned = ids[: settings.max_length], learned[: settings.max_length]
    if settings.too_long != "cut" or not _learnable(learned):
        return Encoded([], b"", length, Fate.DROPPED)
    return Encoded(ids, learned, length, Fate.CUT)


def _learnable(learned: bytes) -> bool:
    """Whether a token is learned; the first one has none before it to be predicted from."""
    return 1 in learned[1:]


def bos_of(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before plain text by itself, if it does."""
    first = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _passages(documents: Sequence[Document], tokenizer: Any, settings: TextData) -> list[Passage]:
    """Each document as one text. One without anything to learn has no spans, and nothing after it."""
    everything = settings.learn == "all"
    if settings.learn == "last":
        documents = [_until_last(document) for document in documents]
    bos = bos_of(tokenizer)
    stops = tuple(filter(None, {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}))
    return [
        _chat_passage(document, tokenizer, everything, stops)
        if document.messages
        else _plain_passage(document, tokenizer, everything, bos)
        for document in documents
    ]


def _plain_passage(document: Document, tokenizer: Any, everything: bool, bos: list[int]) -> Passage:
    if tokenizer.eos_token_id is None:
        raise AdapterError("the tokenizer has no eos_token, which tells a model to stop: choose another base")
    text, border = document.prompt + document.completion, len(document.prompt)
    if not (text if everything else document.completion).strip():
        return Passage(text, border, [], [], [])
    spans = _everything(text) if everything else [(border, len(text) + 1)]
    return Passage(text, border, spans, bos, [tokenizer.eos_token_id])


def _everything(text: str) -> Spans:
    """All of the text; beyond its ends, for a tokenizer may count a blank at an end as lying outside."""
    return [(-1, len(text) + 1)]


def _chat_passage(document: Document, tokenizer: Any, everything: bool, stops: tuple[str, ...]) -> Passage:
    """The chat as its template writes it; the spans are the assistant's turns, each with its end-of-turn token."""
    messages, tools, given = document.messages, document.tools, document.given
    learned = [m for i, m in enumerate(messages) if everything or (m["role"] == "assistant" and i >= given)]
    try:
        text = rendered_chat(messages, tokenizer, tools)
        if not any(m["content"].strip() or m.get("tool_calls") for m in learned):
            return Passage(text, len(text), [], [], [])
        spans = answer_spans(messages, text, tokenizer, tools, given)
        if spans is None and not everything:
            spans = marked_spans(messages, tokenizer, tools, given)
    except AdapterError as error:
        raise AdapterError(f"{document.place}: {error}") from error
    spans = [_to_stop(text, begin, end, stops) for begin, end in spans or []]
    border = spans[0][0] if spans else 0
    unfinished = messages[-1]["role"] == "assistant" and not text.rstrip().endswith(stops)
    after = [tokenizer.eos_token_id] if unfinished and tokenizer.eos_token_id is not None else []
    return Passage(text, border, _everything(text) if everything else spans, [], after)


def _until_last(document: Document) -> Document:
    """A chat up to the last of the assistant's turns, which alone is learned."""
    turns = [i for i, message in enumerate(document.messages) if message["role"] == "assistant"]
    return replace(document, messages=document.messages[: turns[-1] + 1], given=turns[-1]) if turns else document


def _to_stop(text: str, begin: int, end: int, stops: tuple[str, ...]) -> tuple[int, int]:
    """The span without the blanks behind its end-of-turn token, where it has one."""
    length = len(text[begin:end].rstrip())
    return (begin, begin + length) if text.endswith(stops, begin, begin + length) else (begin, end)


def _tokenised(passages: Sequence[Passage], tokenizer: Any) -> list[Tokens]:
    """The tokens of each passage, with the ids that go before and after its text."""
    inside = any(  # else nobody asks where in the text a token is, which takes a fifth of the time
        0 <= begin != passage.border or end <= len(passage.text) for passage in passages for begin, end in passage.spans
    )
    wholes = _called([passage.text for passage in passages], tokenizer, inside)
    heads = _called([passage.text[: passage.border] for passage in passages], tokenizer, inside)
    apart = [i for i, (head, _) in enumerate(heads) if wholes[i][0][: len(head)] != head]
    tails = _called([passages[i].text[passages[i].border :] for i in apart], tokenizer, inside)
    for i, (tail, places) in zip(apart, tails, strict=True):
        head, head_places = heads[i]
        border = passages[i].border
        moved = [(begin + border, end + border) for begin, end in places]
        wholes[i] = (head + tail, head_places + moved)
    tokens = []
    for passage, (ids, places), (head, _) in zip(passages, wholes, heads, strict=True):
        flags = bytearray(len(ids))
        for begin, end in passage.spans:
            at_border = begin == passage.border
            first = len(head) if at_border else bisect_right(places, begin, key=lambda place: place[1])
            to_end = end > len(passage.text)
            last = len(ids) if to_end else bisect_left(places, end, key=lambda place: place[0])
            flags[first:last] = b"\1" * (last - first)
        before, after = passage.before, passage.after
        learned = bytes(len(before)) + flags + b"\1" * len(after)
        prompt = range(len(before), len(before) + len(head))
        tokens.append(Tokens(before + ids + after, learned, prompt))
    return tokens


def _called(texts: list[str], tokenizer: Any, places: bool) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Each text's ids, and the characters that each id stands for, where `places` are asked for."""
    if not texts:
        return []
    refuse_slow(tokenizer)
    different = list(dict.fromkeys(texts))  # rows often share their prompt
    found = tokenizer(
        different,
        add_special_tokens=False,
        return_offsets_mapping=places,
        return_attention_mask=False,
        verbose=False,
    )
    offsets = found["offset_mapping"] if places else [[] for _ in different]
    tokens = dict(zip(different, zip(found["input_ids"], offsets, strict=True), strict=True))
    return [tokens[text] for text in texts]


def refuse_slow(tokenizer: Any) -> None:
    """Raises `AdapterError` for a tokenizer that is not a fast one."""
    if not tokenizer.is_fast:
        raise AdapterError("the tokenizer cannot say which characters a token stands for (it is not a fast one)")
