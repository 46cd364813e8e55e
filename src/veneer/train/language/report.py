"""What became of the rows: how many are used, how long they are, which were cut, dropped or left out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from veneer.core.errors import AdapterError
from veneer.train.data.rows import Table
from veneer.train.language.settings import TextData


class Fate(IntEnum):
    """What becomes of a row."""

    KEPT = 0
    CUT = 1
    DROPPED = 2
    LEFT_OUT = 3


@dataclass(slots=True)
class Tally:
    """How many rows something happened to, and the places of the first three."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        more = f" and {self.count - len(self.places):,} more" if self.count > len(self.places) else ""
        return "; ".join(self.places) + more


@dataclass(slots=True)
class TokenReport:
    """What became of the rows. `tokens` and `learned` count what is trained on; the lengths are from before cutting."""

    rows: int
    limit: str  # what the settings say
    kept: int = 0
    tokens: int = 0
    learned: int = 0
    lengths: Sequence[int] = ()  # sorted; rows with nothing to learn not
    cut: Tally = field(default_factory=Tally)
    dropped: Tally = field(default_factory=Tally)
    left_out: Tally = field(default_factory=Tally)

    def length(self, share: float) -> int:
        """The length that this share of the rows does not exceed: 0 the shortest, 0.5 the median, 1 the longest."""
        return int(self.lengths[round(share * (len(self.lengths) - 1))])

    def sentences(self) -> list[str]:
        """The report in plain sentences."""
        said = [
            f"{self.kept:,} of {self.rows:,} rows are used: {self.tokens:,} tokens, {self.learned:,} of them learned.",
            f"The shortest row has {self.length(0):,} tokens, the longest {self.length(1):,}; "
            f"half have at most {self.length(0.5):,}, 95% at most {self.length(0.95):,}.",
        ]
        limit = f"longer than {self.limit}"
        for tally, fate in (
            (self.cut, f"{limit} and cut"),
            (self.dropped, f"{limit} and dropped"),
            (self.left_out, "without anything to learn and left out"),
        ):
            if tally.count:
                said.append(f"Rows {fate}: {tally.count:,} ({tally}).")
        return said


def reported(rows: Table, sizes: Table, place: Callable[[int], str], settings: TextData) -> TokenReport:
    """What became of the rows: `length`, `learned` and `fate` of each, its tokens, and where it is.

    Raises `AdapterError` where the settings refuse long rows, and where no row is left.
    """
    fates = rows["fate"]
    used = fates <= Fate.CUT
    report = TokenReport(len(rows), settings.limit, int(used.sum()), int(sizes.sum()), int(rows["learned"].sum()))
    report.lengths = np.sort(rows["length"][fates != Fate.LEFT_OUT])  # type: ignore[assignment]
    for tally, fate in ((report.cut, Fate.CUT), (report.dropped, Fate.DROPPED), (report.left_out, Fate.LEFT_OUT)):
        found = np.flatnonzero(fates == fate)
        tally.count = len(found)
        tally.places = [place(int(row)) for row in found[:3]]
        if fate != Fate.LEFT_OUT:
            lengths = rows["length"][found[:3]]
            tally.places = [f"{at}, {length:,} tokens" for at, length in zip(tally.places, lengths, strict=True)]
    _refuse_unusable(report, settings)
    return report


def _refuse_unusable(report: TokenReport, settings: TextData) -> None:
    """Raises where the settings refuse long rows, and where no row is left."""
    too_long = f"{report.dropped.count:,} of {report.rows:,} rows are longer than {report.limit}"
    if settings.too_long == "error" and report.dropped.count:
        raise AdapterError(
            f"{too_long} ({report.dropped}); the longest has {report.length(1):,} tokens: raise this, "
            "or say data.too_long=cut or data.too_long=drop"
        )
    if report.kept == 0 and report.dropped.count:
        raise AdapterError(f"{too_long} and were dropped ({report.dropped}), so no row is left: raise it")
    if report.kept == 0:
        raise AdapterError(
            f"none of the {report.rows:,} rows has anything to learn ({report.left_out}): expected a text, a "
            "completion or an assistant turn that is not empty"
        )
