"""Curves of runs, to look at."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.safe.whole import write_whole

Records = Sequence[Mapping[str, Any]]
COLOURS = ("#1f5a8a", "#c4622d", "#3f7d4e", "#7a4f9a", "#a03c4b", "#5f6b73", "#b08d2e", "#2b8f93")


def draw_losses(records: Iterable[Mapping[str, Any]], path: Path, title: str, held_out: str = "held out") -> None:
    """loss.png: the loss of each step, its running mean, and the loss that is called `held_out`."""
    records = list(records)
    figure, axes = _axes(title)
    _curves(axes, records, COLOURS[0], "running mean", held_out, COLOURS[1])
    _finish(figure, axes, path)


def draw_together(runs: Mapping[str, Records], path: Path) -> None:
    """The running means of several runs, and their held-out losses as dots, in one picture."""
    figure, axes = _axes("loss, by run")
    for number, (name, records) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        _curves(axes, records, colour, name, None, colour, pale=False)
    _finish(figure, axes, path)


def _axes(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curves(
    axes: Any, records: Records, colour: str, mean: str, held_out: str | None, other: str, pale: bool = True
) -> None:
    steps = [(r["step"], r["loss"]) for r in records if "loss" in r]
    measured = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if steps:
        x, y = zip(*steps, strict=True)
        if pale:
            axes.plot(x, y, color="#9db4c8", linewidth=1, label="each step")
        axes.plot(x, _running_mean(y), color=colour, linewidth=2, label=mean)
    if measured:
        axes.plot(*zip(*measured, strict=True), "o-", color=other, markersize=5, linewidth=1, label=held_out)


def _running_mean(values: Iterable[float]) -> list[float]:
    mean, means = 0.0, []
    for count, value in enumerate(values, 1):
        mean += (value - mean) * max(0.1, 1 / count)
        means.append(mean)
    return means


def _finish(figure: Any, axes: Any, path: Path) -> None:
    if axes.lines:
        axes.legend(frameon=False)
    write_whole({path: lambda temporary: figure.savefig(temporary, dpi=120, format="png")})
