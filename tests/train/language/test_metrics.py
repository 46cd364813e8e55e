"""Figures, by hand."""

import numpy as np
import pytest

from veneer.train.language.metrics import (
    answer_figures,
    classification,
    confusion,
    entities,
    entity_figures,
    is_entity_tag,
    matthews,
    normal,
    pearson,
    spearman,
)


def test_classes():
    true, said = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 0, 1, 0, 1])
    # three right of the second class, one wrongly said, one missed: 2·3 / (2·3 + 1 + 1); (3·3 - 1·1) / √(4·4·4·4)
    figures = classification(said, true, 2)
    assert figures == pytest.approx({"accuracy": 6 / 8, "f1": 6 / 8, "matthews": 8 / 16})
    assert confusion(said, true, 2).tolist() == [[3, 1], [1, 3]]


def test_three_classes_count_alike_and_those_that_do_not_occur_not_at_all():
    true, said = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    # F1: 2·2/(3+3), 2·2/(3+2), 0
    figures = classification(said, true, 4)
    assert figures["f1"] == pytest.approx((4 / 6 + 4 / 5 + 0) / 3)
    # R_K: (4·6 - (3·3 + 3·2 + 0·1)) / √((36 - 18)(36 - 14))
    assert figures["matthews"] == pytest.approx((24 - 15) / (18 * 22) ** 0.5)
    assert matthews(confusion(np.zeros(4, int), np.array([0, 1, 0, 1]), 2)) == 0


def test_correlations():
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 9.0])
    # deviations -1.5 -.5 .5 1.5 and -2.75 -.75 -1.75 5.25; Σ products 11.5, squares 5 and 38.75
    assert pearson(a, b) == pytest.approx(11.5 / (5 * 38.75) ** 0.5)
    assert spearman(a, b) == pytest.approx(1 - 6 * 2 / (4 * 15))  # the ranks differ by 0, 1, 1, 0
    assert spearman(a, np.exp(b) * 5) == spearman(a, b)
    assert pearson(a, np.ones(4)) == 0
    tied = np.array([1.0, 1.0, 2.0, 2.0])  # ranks 1.5 1.5 3.5 3.5
    assert spearman(a, tied) == pytest.approx(4 / (5 * 4) ** 0.5)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-A I-A O B-A", [(0, 2, "A"), (3, 4, "A")]),
        ("B-A B-A I-A", [(0, 1, "A"), (1, 3, "A")]),
        ("I-A I-A I-B", [(0, 2, "A"), (2, 3, "B")]),
        ("B-A I-B O", [(0, 1, "A"), (1, 2, "B")]),
        ("S-A S-A B-A I-A E-A E-A", [(0, 1, "A"), (1, 2, "A"), (2, 5, "A"), (5, 6, "A")]),
        ("B-A E-A I-A", [(0, 2, "A"), (2, 3, "A")]),
        ("O O", []),
    ],
)
def test_entities_begin_and_end_as_conlleval_says(tags: str, found: list):
    assert entities([[], tags.split()]) == {(1, *own) for own in found}


def test_an_entity_is_right_with_type_and_borders():
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    said = [["B-PER", "I-PER", "O", "B-ORG"], ["B-ORG", "I-ORG"]]
    # three true, three said, one right
    assert entity_figures(said, true) == pytest.approx({"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3})
    assert [is_entity_tag(tag) for tag in ("O", "B-PER", "I-x-y", "NOUN", "B", "B-")] == [True] * 3 + [False] * 3


def test_answers_as_squad_compares_them():
    assert normal("  The Cat's, hat.") == "cats hat"
    # exact by the second; of "black cat" and "cat sat down": one shared word, 2·1 / (2 + 3); none where none is
    said, true = ["the cat", "a black cat", "", "x"], [["dog", "Cat."], ["cat sat down"], [], ["y"]]
    assert answer_figures(said, true) == pytest.approx({"exact_match": 2 / 4, "f1": (1 + 0.4 + 1 + 0) / 4})
    assert answer_figures(["", "word"], [["word"], []]) == {"exact_match": 0, "f1": 0}
