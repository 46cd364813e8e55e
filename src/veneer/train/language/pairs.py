"""Pairs become tokens of an encoder and of a decoder: ids of both, end to end, of which the decoder's are learned.

The encoder reads the prompt between the tokens that the tokenizer puts around a text; the decoder learns the completion
between those that it puts around a target. What the decoder is given, its start and all but the last of these, is the
model's own business.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from veneer.core.errors import AdapterError
from veneer.train.language.report import Fate
from veneer.train.language.settings import PairData
from veneer.train.language.shapes import Document
from veneer.train.language.tokens import BATCH, Encoded, Example, refuse_slow

Frame = tuple[list[int], list[int]]  # ids before and after a text


def encode_pairs(documents: Iterable[Document], tokenizer: Any, settings: PairData) -> Iterator[Encoded]:
    """Each document as tokens; a few are held at once."""
    refuse_slow(tokenizer)
    source, target = frame_of(tokenizer, "text"), frame_of(tokenizer, "text_target")
    rest = iter(documents)
    while batch := list(islice(rest, BATCH)):
        prompts = _bare([document.prompt for document in batch], tokenizer)
        completions = _bare([document.completion for document in batch], tokenizer)
        for document, prompt, completion in zip(batch, prompts, completions, strict=True):
            if document.completion.strip():
                yield _pair(_framed(prompt, source), _framed(completion, target), source, settings)
            else:
                yield Encoded([], b"", len(prompt), Fate.LEFT_OUT)


def encode_source(prompt: Any, tokenizer: Any, settings: PairData) -> list[int]:
    """What the encoder is given for a prompt, as in training."""
    if not isinstance(prompt, str):
        raise AdapterError("a text-to-text model reads texts: expected a prompt, found the messages of a chat")
    source = frame_of(tokenizer, "text")
    return _cut(_framed(_bare([prompt], tokenizer)[0], source), source, settings.max_length)


def sides(example: Example) -> tuple[list[int], list[int]]:
    """(the encoder's ids, the decoder's)."""
    border = example.learned.index(1)
    return list(example.ids[:border]), list(example.ids[border:])


def frame_of(tokenizer: Any, side: str) -> Frame:
    """The ids that the tokenizer puts before and after a `text`, or a `text_target`."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer(**{side: "a"}).input_ids
    for begin in range(len(whole) - len(bare) + 1):
        if whole[begin : begin + len(bare)] == bare:
            return whole[:begin], whole[begin + len(bare) :]
    raise AdapterError(f"the tokenizer writes the {side} 'a' as {whole}, and alone as {bare}: choose another base")


def _pair(prompt: list[int], completion: list[int], source: Frame, settings: PairData) -> Encoded:
    length = len(prompt) + len(completion)
    kept = _cut(prompt, source, settings.max_length), completion[: settings.max_completion]
    fate = Fate.KEPT if kept == (prompt, completion) else Fate.CUT
    if fate == Fate.CUT and settings.too_long != "cut":
        return Encoded([], b"", length, Fate.DROPPED)
    return Encoded(kept[0] + kept[1], bytes(len(kept[0])) + b"\1" * len(kept[1]), length, fate)


def _cut(prompt: list[int], source: Frame, most: int) -> list[int]:
    """The prompt without what is too much of its text; what stands around it stays."""
    surplus, end = max(0, len(prompt) - most), len(prompt) - len(source[1])
    return prompt[: max(0, end - surplus)] + prompt[end:]


def _framed(ids: list[int], frame: Frame) -> list[int]:
    return frame[0] + ids + frame[1]


def _bare(texts: list[str], tokenizer: Any) -> list[list[int]]:
    different = list(dict.fromkeys(texts))
    found = tokenizer(different, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    ids = dict(zip(different, found, strict=True))
    return [ids[text] for text in texts]
