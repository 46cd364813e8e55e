"""`veneer train`: a recipe in, a run folder out."""

import os
import shlex
import shutil
import sys
from collections import defaultdict
from contextlib import nullcontext
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.lines import speaks
from veneer.cli.sweep import sweep
from veneer.core.errors import AdapterError

if TYPE_CHECKING:
    from veneer.train.run import Preview, Result


def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (`veneer recipes` lists them) or a file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Values that replace the recipe's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; train nothing, write nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest run of this recipe that was cut short.")
    ] = False,
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Resume though recipe, data, base or machine have changed.")
    ] = False,
    axes: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="KEY.SUB=V1,V2", help="A run for each value; repeated, for each combination."),
    ] = None,
) -> None:
    """Train an adapter: a recipe in, a run folder out."""
    _launch()
    from veneer.cli.terminal import TerminalReporter
    from veneer.train import run
    from veneer.train.task import Reporter

    if axes:
        if dry_run or allow_inexact:
            raise AdapterError("--sweep trains each run by its own recipe: leave --dry-run and --allow-inexact out")
        sweep(recipe, overrides or (), axes, resume)
        return
    settings, task = run.read_recipe(recipe, overrides or ())
    with TerminalReporter() if speaks() else nullcontext(Reporter()) as reporter:
        reporter.say(f"recipe {recipe}: {settings.task} on {settings.base}")
        if dry_run and not speaks():
            return
        if dry_run:
            _show_preview(run.preview(settings, task, reporter))
            return
        own = Path(recipe).expanduser()
        result = run.run(settings, task, reporter, resume and (own if own.is_dir() else True), allow_inexact)
    if result.run.writes:
        _show_result(result, shipped=not Path(recipe).expanduser().exists())
    if result.outcome.interrupted:
        raise typer.Exit(128 + result.outcome.stopped_by)


def _launch() -> None:
    """`NPROC_PER_NODE=2 veneer train …` is `torchrun --nproc-per-node 2 -m veneer train …`."""
    asked = os.environ.get("NPROC_PER_NODE", "1")
    if asked == "1" or "RANK" in os.environ:
        return
    if not asked.isdecimal() or not int(asked):
        raise AdapterError(f"NPROC_PER_NODE is {asked!r}: expected how many processes are to run on this machine")
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    getLogger("torch.distributed.elastic").setLevel(ERROR)
    try:
        torchrun.main(["--standalone", "--nproc-per-node", asked, "-m", "veneer", *sys.argv[1:]])
    except ChildFailedError as error:  # which has said why
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit(0)


def _show_preview(preview: "Preview") -> None:
    from rich.console import Console
    from rich.text import Text

    from veneer.cli.terminal import size
    from veneer.core.errors import collapsed
    from veneer.train.settings import as_yaml

    console = Console(highlight=False)
    console.rule("recipe")
    console.print(as_yaml(preview.recipe), markup=False, end="")
    console.rule("adapter")
    print(f"adapted layers ({len(preview.layers)}): {collapsed(preview.layers)}")
    share = 100 * preview.trainable / preview.parameters
    print(f"trainable parameters: {preview.trainable:,} of {preview.parameters:,} ({share:.2f} %)")
    print(f"optimizer steps: {preview.steps:,}")
    memory = preview.memory
    print(
        f"memory, about: {size(memory.total)} (interpreter and libraries {size(memory.process)}, base "
        f"{size(memory.base)}, adapter and optimizer {size(memory.adapter)}, activations {size(memory.activations)}, "
        f"allocator and kernels {size(memory.slack)}; while loading {size(memory.loading)})"
    )
    console.rule(preview.unit)
    for sentence in preview.facts["report"].sentences():
        print(sentence)
    print("A few examples; what is learned is green and underlined:")
    for look in preview.facts["looks"]:
        text = Text()
        for part, learned in look:
            text.append(part, style="green underline" if learned else "dim")
        console.print(text)
        print()


def _show_result(result: "Result", shipped: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from veneer.train.card import ASKED, NAMES

    console = Console(highlight=False)
    if result.samples and not set(result.samples[0]) <= ASKED:  # what was drawn is on the sheet
        shown = [key for key in result.samples[0] if key != "reference"]
        table = Table(*shown, show_lines=True)
        for sample in result.samples:
            table.add_row(*(Text(sample[key].strip()) for key in shown))
        console.print(table)
    figures = Table("", "before", "after", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for key, value in result.after.items():
        figures.add_row(NAMES.get(key, key), f"{result.before[key]:.3f}", f"{value:.3f}")
    if result.after:
        console.print(figures)
    _show_facts(result)
    _show_next(result, shipped)


def _show_facts(result: "Result") -> None:
    from veneer.cli.terminal import size

    outcome, folder = result.outcome, result.run.folder
    share = 100 * result.trainable / result.parameters
    print(f"trainable parameters  {result.trainable:,} of {result.parameters:,} ({share:.2f} %)")
    print(f"adapter               {size(result.adapter_bytes)} in {result.run.adapter}")
    print(f"peak memory           {size(result.peak_bytes)}")
    print(f"time                  {result.seconds:.0f} s, {outcome.seconds:.0f} s of it for {outcome.steps} steps")
    files = ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
    print(f"the run               {folder}: {files}")
    if (sheet := folder / "samples" / "answers.png").is_file():
        print(f"to look at            {sheet}")
    if outcome.interrupted:
        print(f"interrupted after step {outcome.steps}; what was learned until then is in {result.run.adapter}")
        print(f"to go on              {_command()} train {folder} --resume")


def _show_next(result: "Result", shipped: bool) -> None:
    folder = result.run.folder
    asked = {"seed": "0"} | {key: _quoted(text) for key, text in (result.samples[0] if result.samples else {}).items()}
    veneer = _command()
    print("\nworth typing next:")
    print(f"  {veneer} {result.asking.format_map(defaultdict(lambda: _quoted('…'), asked, adapter=folder))}")
    print(f"  {veneer} merge {folder} --out {folder}-merged")
    if shipped:
        print(f"  {veneer} recipes copy {result.recipe.task} my.yaml     # then train on data of your own")


def _command() -> str:
    """How this program was called: by its name, where a shell finds it, else by its path."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return "python -m veneer"
    found = shutil.which(called.name)
    return called.name if found and Path(found).resolve() == called.resolve() else str(called)


def _quoted(text: str) -> str:
    return shlex.quote(text)
