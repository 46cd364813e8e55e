"""`Expression`: says what `re` says, and cannot hang."""

import gc
import re
import time
import warnings
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer import AdapterError
from veneer.safe.expression import LONGEST, Expression, Path, faulty

ATOMS = [
    "a", "b", ".", r"\.", "[ab]", "[^a.]", "[a-c]", r"[\d.]", r"\w", r"\W", r"\d", r"\D", r"\s", "^", "$", r"\A", r"\Z",
    r"\b", r"\B", "(?=a)", "(?!b)", "(?!)", "(?<=a)", "(?<!ab)", "a.b", r"a\.b", "^a", "",
]  # fmt: skip
QUANTIFIERS = ["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{2,}", "{0}"]


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(QUANTIFIERS)).map(lambda two: f"({two[0]}){two[1]}"),
        st.tuples(st.sampled_from(ATOMS[:12]), st.sampled_from(QUANTIFIERS)).map("".join),
    )


@settings(max_examples=1500, deadline=None, database=None, derandomize=True)
@given(st.recursive(st.sampled_from(ATOMS), _larger, max_leaves=6), st.text("ab.1_\n", min_size=1, max_size=6))
def test_says_what_re_says(text, path):
    with warnings.catch_warnings(action="ignore"):
        theirs, tail = re.compile(text), re.compile(rf"(.*\.)?({text})$", re.DOTALL)
    assert Expression(text).whole(Path(path)) == bool(theirs.fullmatch(path))
    if "\n" not in path:
        assert Expression(text).tail(Path(path)) == bool(tail.match(path))


MODULES = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(300) for name in "qkvo"]
IN_THE_WILD = {
    r".*\.(q_proj|v_proj)": 600,
    r"^(?!.*\.1\d\d\.).*(?:q|k)_proj$": 400,
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|k_proj|v_proj)))": 900,
}
HOSTILE = [
    "(a|a)*b",
    "((.*)*)*!",
    ".*" * 40 + "!",
    "(.?){1000000}!",
    "((((.?l?)*m?)*)*)*(?=(((.?.?)*)*)*)!",
    "(l|el|.)*" * 50,
]


@pytest.mark.parametrize(("text", "count"), IN_THE_WILD.items())
def test_expressions_of_the_wild_match_and_are_quick(text, count):
    start = time.process_time()
    expression = Expression(text)
    assert sum(expression.whole(Path(path)) for path in MODULES) == count
    assert time.process_time() - start < 1


@pytest.mark.parametrize("text", HOSTILE, ids=str)
def test_no_expression_hangs(text):
    start = time.process_time()
    expression, path = Expression(text), Path(MODULES[0] * 2)
    for match in (expression.whole, expression.tail):
        with suppress(AdapterError):
            match(path)
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(", "is not a regular expression"),
        ("a{99999999999}", "is not a regular expression"),
        ("(" * 5000, "is not a regular expression"),
        (r"(a)\1", "not supported: it has a groupref"),
        (r"(a)?(?(1)b|c)", "not supported: it has a groupref exists"),
        ("(?i)a", "not supported: it sets flags"),
        ("(?i:a)", "not supported: it sets flags"),
        ("(?>a*)", "not supported: it has a atomic group"),
        ("a*+", "not supported: it has a possessive repeat"),
        ("(?<=a*)b", "not supported: it has a look-behind of no fixed width"),
        ("[\0-\U0010ffff]", "not supported: it has a range of more than 1000 characters"),
        ("(a)" * LONGEST, "is too long"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_supported_is_said(text, said):
    with pytest.raises(AdapterError, match=said):
        Expression(text).whole(Path("a"))
    assert faulty([text])


@pytest.fixture
def alone():
    """Without the collector, whose work over all that other tests left would count as this one's."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("part", ["[\1-\u03e0]", "[\u0100-\u0101]", "(a.)", "ab|", "[^a]*", r"\w"], ids=str)
def test_a_long_expression_costs_little(part):
    """Of two thousand different classes too, and on all the paths of a large model."""
    text = (part * LONGEST)[: LONGEST // len(part) * len(part)]
    start = time.process_time()
    assert not faulty([text])
    expression = Expression(text)
    with suppress(AdapterError):
        for path in MODULES[:100]:
            expression.whole(Path(path))
    assert time.process_time() - start < 1
