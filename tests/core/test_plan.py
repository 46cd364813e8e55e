"""`Plan`: what a name, a list or a mapping asks for."""

import math

import pytest

from veneer import AdapterError
from veneer.core.plan import Plan, Term, terms_of

KNOWN = ("fr", "de", "formal")


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("fr", (Term("fr", 1.0),)),
        (["fr", "de"], (Term("fr"), Term("de"))),
        (("de",), (Term("de"),)),
        ({"fr": 0.7, "formal": 1}, (Term("fr", 0.7), Term("formal", 1.0))),
        ([], ()),
        ({}, ()),
    ],
    ids=str,
)
def test_the_terms_of_a_spec(spec, terms):
    assert terms_of(spec, KNOWN) == terms


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("formel", "no adapter named 'formel'; the model carries 'fr', 'de', 'formal'; did you mean 'formal'"),
        (["fr", "xx", "yy"], "no adapter named 'xx', 'yy'"),
        ({"it": 1.0}, "no adapter named 'it'"),
        (["fr", "fr"], "may be named once, found 'fr', 'fr'; use weights"),
        ({"fr": math.nan}, "a finite number, found {'fr': nan}"),
        ({"fr": "much", "de": 1}, "a finite number, found {'fr': 'much'}"),
        ({"fr": None}, "a finite number"),
    ],
    ids=str,
)
def test_a_spec_that_cannot_be_is_refused(spec, said):
    with pytest.raises(AdapterError, match=said):
        terms_of(spec, KNOWN)


def test_a_plan_starts_as_the_base_model():
    assert Plan() == Plan(terms=(), merged=())
