"""Files of every format: each changes the weights as its formula says, and a peer reads it so or errs as is known.

A peer that errs no longer, or otherwise, fails here too: then the case is to be told again.
"""

from pathlib import Path

import pytest

from peers.cases import Case
from peers.pipelines import wrong
from peers.sides import PEERS, through_veneer
from peers.table import CASES

File = tuple[Case, Path]


@pytest.fixture(scope="module", params=CASES)
def file(request, tmp_path_factory) -> File:
    case = CASES[request.param]()
    return case, case.write(tmp_path_factory.mktemp("file"))


def test_veneer_reads_what_the_formula_says(file):
    case, path = file
    assert wrong(through_veneer(case, path), case.wanted) == {}


def test_the_peer_reads_it_so_or_errs_as_known(file):
    case, path = file
    if case.refused:
        with pytest.raises(Exception, match=f"(?s){case.refused}"):
            PEERS[case.peer](case, path)
    elif case.peer:
        assert wrong(PEERS[case.peer](case, path), case.found_by_peer()) == {}
    mistaken = {name: case.wanted[name] for name in case.mistaken}
    assert wrong(case.mistaken, mistaken).keys() == mistaken.keys()  # none is a matter of rounding
