"""How near predictions are to what people said: the figures of GLUE, CoNLL-2003 and SQuAD, as shares of 1."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[Any]]
Entity = tuple[int, int, int, str]  # its row, its first word, the one behind its last, its type


def classification(predicted: Numbers, true: Numbers, classes: int) -> dict[str, float]:
    """`accuracy`, `f1` and `matthews` of class numbers."""
    counts = confusion(predicted, true, classes)
    return {"accuracy": float(counts.trace() / counts.sum()), "f1": f1(counts), "matthews": matthews(counts)}


def confusion(predicted: Numbers, true: Numbers, classes: int) -> Numbers:
    """`(classes, classes)`: how many rows of each true class, a row, were predicted as each, a column."""
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def f1(counts: Numbers) -> float:
    """2 · right / (predicted + true): of the second class where there are two, else the mean over those that occur."""
    right, total = counts.diagonal(), counts.sum(0) + counts.sum(1)
    scores = 2 * right / np.maximum(total, 1)
    return float(scores[1]) if len(counts) == 2 else float(scores[total > 0].mean())


def matthews(counts: Numbers) -> float:
    """R_K (Gorodkin 2004), which for two classes is Matthews' correlation; 0 where all is one class."""
    predicted, true, total = counts.sum(0).astype(float), counts.sum(1).astype(float), float(counts.sum())
    together = counts.trace() * total - predicted @ true
    spread = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    return float(together / spread**0.5) if spread > 0 else 0.0


def pearson(predicted: Numbers, true: Numbers) -> float:
    """Σ (p - p̄)(y - ȳ) / √(Σ (p - p̄)² Σ (y - ȳ)²); 0 where one of the two does not vary."""
    p, y = (own.astype(float) - own.astype(float).mean() for own in (predicted, true))
    spread = float((p @ p) * (y @ y)) ** 0.5
    return float(p @ y) / spread if spread > 0 else 0.0


def spearman(predicted: Numbers, true: Numbers) -> float:
    """Pearson's correlation of the ranks; equal numbers share the mean of theirs."""
    return pearson(_ranks(predicted), _ranks(true))


def _ranks(values: Numbers) -> Numbers:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def is_entity_tag(tag: str) -> bool:
    """Whether it is `O`, or a type behind `B-`, `I-`, `E-` or `S-`."""
    return tag == "O" or bool(re.fullmatch(r"[BIES]-.+", tag))


def entities(tags: Iterable[Sequence[str]]) -> set[Entity]:
    """The entities of each row's tags, as conlleval and seqeval find them: a word goes on with the entity before it
    where it is `I-` or `E-` of the same type, and `B-` or `I-` stands before; every other tag but `O` begins one.
    """
    found: set[Entity] = set()
    for row, own in enumerate(tags):
        first, before = 0, "O"
        for place, tag in enumerate([*own, "O"]):
            goes_on = before[0] in "BI" and tag[0] in "IE" and before[1:] == tag[1:]
            if before != "O" and not goes_on:
                found.add((row, first, place, before[2:]))
            first, before = first if goes_on else place, tag
    return found


def entity_figures(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """`precision`, `recall` and `f1` of whole entities: type and borders, all types together."""
    ours, theirs = entities(predicted), entities(true)
    right = len(ours & theirs)
    shares = {"precision": right / max(1, len(ours)), "recall": right / max(1, len(theirs))}
    return {**shares, "f1": 2 * right / max(1, len(ours) + len(theirs))}


def normal(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, no punctuation, no articles, single blanks."""
    text = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_figures(predicted: Sequence[str], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's `exact_match` and `f1` (Rajpurkar et al. 2016), against the best of each question's answers; one without
    answers (SQuAD 2) is answered by nothing.
    """
    exact, overlap = 0.0, 0.0
    for ours, answers in zip(predicted, true, strict=True):
        theirs = [answer for answer in answers if normal(answer)] or [""]
        exact += max(normal(ours) == normal(answer) for answer in theirs)
        overlap += max(_shared_words(normal(ours).split(), normal(answer).split()) for answer in theirs)
    return {"exact_match": exact / max(1, len(predicted)), "f1": overlap / max(1, len(predicted))}


def _shared_words(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))
