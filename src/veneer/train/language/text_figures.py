"""How near generated texts are to what people wrote: BLEU, ROUGE-L and chrF of 100, exact matches as a share of 1."""

import math
import re
from collections.abc import Callable, Sequence

Texts = Sequence[str]
References = Sequence[Sequence[str]]  # of each text, one or more


def perplexity(loss: float) -> float:
    """exp(loss), of a mean loss in nats a token."""
    return math.exp(min(loss, 700.0))


def text_figures(answers: Texts, references: References, wanted: Sequence[str]) -> dict[str, float]:
    """Those figures that are wanted, by name."""
    return {name: FIGURES[name](answers, references) for name in FIGURES if name in wanted}


def bleu(answers: Texts, references: References) -> float:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu defines it; any number of references an answer."""
    from sacrebleu import corpus_bleu

    return float(corpus_bleu(list(answers), _streams(references)).score)


def chrf(answers: Texts, references: References) -> float:
    """Corpus chrF (Popović 2015), F₂ of character 1- to 6-grams, as sacrebleu defines it."""
    from sacrebleu import corpus_chrf

    return float(corpus_chrf(list(answers), _streams(references)).score)


def rouge_l(answers: Texts, references: References) -> float:
    """ROUGE-L (Lin 2004): 100 · mean of 2 · LCS / (words of the answer + of the reference), of the best reference.

    Words are runs of letters and digits, in small letters and with their endings, as in Google's rouge-score.
    """
    best = []
    for answer, own in zip(answers, references, strict=True):
        said = _words(answer)
        best.append(max(_overlap(said, _words(reference)) for reference in own))
    return 100 * sum(best) / len(best)


def exact_match(answers: Texts, references: References) -> float:
    """The share of answers that are one of their references, to the letter but for blanks."""
    pairs = zip(answers, references, strict=True)
    return sum(answer.split() in [own.split() for own in known] for answer, known in pairs) / len(answers)


FIGURES: dict[str, Callable[[Texts, References], float]] = {
    "bleu": bleu,
    "rouge_l": rouge_l,
    "chrf": chrf,
    "exact_match": exact_match,
}


def _streams(references: References) -> list[list[str | None]]:
    """The first reference of every text, the second, …"""
    most = max(len(own) for own in references)
    return [[own[i] if i < len(own) else None for own in references] for i in range(most)]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _overlap(said: list[str], meant: list[str]) -> float:
    return 2 * longest_common(said, meant) / (len(said) + len(meant)) if said and meant else 0.0


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, by the bits of one number (Hyyrö 2004): those that are 0 in the end
    are places of `a` where it grows.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    all_ones = row = (1 << len(a)) - 1
    for word in b:
        found = row & places.get(word, 0)
        row = ((row + found) | (row - found)) & all_ones
    return len(a) - row.bit_count()
