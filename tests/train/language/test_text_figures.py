"""Figures of generated texts: by hand, by their formula, by sacrebleu."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from veneer.train.language.text_figures import (
    FIGURES,
    bleu,
    chrf,
    exact_match,
    longest_common,
    perplexity,
    rouge_l,
    text_figures,
)

ANSWERS = ["the cat sat on the mat", "a dog"]
ONE = [["the cat is on the mat"], ["a dog"]]
SEVERAL = [["there is a cat on the mat", "the cat is on the mat"], ["a dog"]]


@given(*[st.lists(st.sampled_from("abc"), max_size=12)] * 2)
def test_the_longest_common_subsequence_is_that_of_the_table(a, b):
    """L(i, j) = L(i-1, j-1) + 1 where a_i = b_j, else max(L(i-1, j), L(i, j-1))."""
    table = {(i, j): 0 for i, j in product(range(len(a) + 1), range(len(b) + 1)) if i == 0 or j == 0}
    for i, j in product(range(1, len(a) + 1), range(1, len(b) + 1)):
        same = a[i - 1] == b[j - 1]
        table[i, j] = table[i - 1, j - 1] + 1 if same else max(table[i - 1, j], table[i, j - 1])
    assert longest_common(a, b) == table[len(a), len(b)]


@pytest.mark.parametrize(
    ("answer", "references", "wanted"),
    [
        ("the cat sat on the mat", ["the cat is on the mat"], 100 * 5 / 6),
        ("The Cat, sat!", ["the cat sat"], 100),
        ("police killed the gunman", ["police kill the gunman", "the gunman kill police"], 75),  # Lin's own example
        ("the gunman police killed", ["police killed the gunman"], 50),
        ("", ["a"], 0),
        ("a b", [""], 0),
        ("café 12", ["Café 12 x x"], 100 * 2 / 3),
    ],
)
def test_rouge_l_by_hand(answer, references, wanted):
    assert rouge_l([answer], [references]) == pytest.approx(wanted)


def test_rouge_l_is_the_mean_over_answers():
    assert rouge_l(ANSWERS, ONE) == pytest.approx(100 * (5 / 6 + 1) / 2)


@pytest.mark.parametrize("references", [ONE, SEVERAL])
def test_bleu_and_chrf_are_sacrebleus(references):
    most = max(map(len, references))
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    assert bleu(ANSWERS, references) == BLEU().corpus_score(ANSWERS, streams).score
    assert chrf(ANSWERS, references) == CHRF().corpus_score(ANSWERS, streams).score
    assert bleu(ANSWERS, [[answer] for answer in ANSWERS]) == pytest.approx(100)


def test_a_further_reference_only_helps():
    for name in ("bleu", "chrf", "rouge_l", "exact_match"):
        assert FIGURES[name](ANSWERS, SEVERAL) >= FIGURES[name](ANSWERS, ONE) - 1e-9


def test_exact_matches():
    assert exact_match(ANSWERS, ONE) == 0.5
    assert exact_match([" a\n b"], [["x", "a b"]]) == 1.0
    assert exact_match(["A b"], [["a b"]]) == 0.0


def test_those_that_are_wanted():
    assert list(text_figures(ANSWERS, ONE, ["exact_match", "chrf"])) == ["chrf", "exact_match"]


def test_perplexity_is_a_number_whatever_the_loss():
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert math.isfinite(perplexity(1e9))
