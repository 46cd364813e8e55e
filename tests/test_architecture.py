"""Who may import whom (DESIGN 5), and how large a file and a function may be."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "veneer"
LINES, FUNCTION_LINES = 300, 50
DRAWERS = {"utils", "util", "common", "helpers", "helper", "manager", "managers", "misc"}

# part → what of veneer it may import; a part may always import itself
MAY_IMPORT: dict[str, set[str]] = {
    "safe": {"core.errors"},
    "core": {"safe"},
    "apart": {"core"},
    "files": {"core", "safe", "apart"},
    "combine": {"core", "safe", "apart"},
    "analyse": {"core", "safe", "apart", "combine", "files"},
    "library": {"core", "safe", "apart", "files", "analyse"},
    "starts": {"core"},
    "recipes": {"core.errors"},
    "zoo": {"core.errors", "safe.whole"},
    "train": {"core", "safe", "apart", "starts", "files", "library", "recipes", "zoo"},
    "serve": {"core", "files"},
    "studio": {"core", "files", "combine", "analyse", "library", "train", "recipes", "zoo", "serve"},
    "cli": {
        "core",
        "safe",
        "apart",
        "files",
        "combine",
        "analyse",
        "library",
        "train",
        "recipes",
        "zoo",
        "serve",
        "studio",
    },
    # the package itself only says where its names live
    "": {"core", "starts", "files", "combine", "analyse", "library", "train", "recipes", "zoo", "serve", "studio"},
}
# the imports that point up: methods of core's nouns whose work is done above it, imported when called
UPWARDS = {
    ("core/adapter.py", "veneer.files.folder"),
    ("core/config.py", "veneer.files.config"),
    ("core/model.py", "veneer.combine.live"),
    ("core/model.py", "veneer.files.live"),
    ("core/trainer.py", "veneer.analyse.live"),
    ("core/trainer.py", "veneer.files.live"),
}
BELOW = ("core", "safe")
CORE_NEEDS = {"torch", "safetensors", "veneer", *sys.stdlib_module_names}

MODULES = sorted(SOURCE.rglob("*.py"))
PYTHON = [*MODULES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports anywhere in it, those inside functions and of relative imports included."""
    package = ["veneer", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*above, *filter(None, [node.module])])
            # `from veneer import core` names a part; `from veneer.core.errors import listed` does not
            yield from ([f"{home}.{alias.name}" for alias in node.names] if home == "veneer" else [home])


def _allowed(name: str, part: str) -> bool:
    inside = name.removeprefix("veneer").removeprefix(".")
    public = "." not in inside and not (SOURCE / inside).exists() and not (SOURCE / f"{inside}.py").exists()
    homes = {part, *MAY_IMPORT[part]} - {""}
    # a public name of the package (`from veneer import LoraConfig`) comes from core
    return ("core" in homes) if public else any(inside == home or inside.startswith(f"{home}.") for home in homes)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_point_one_way(path):
    part = path.relative_to(SOURCE).parts[0] if path.parent != SOURCE else ""
    part = "cli" if path.name == "__main__.py" else part
    assert part in MAY_IMPORT, f"{part} is not in the table of DESIGN 5"
    upwards = {name for file, name in UPWARDS if path == SOURCE / file}
    ours = {name for name in _imports(path) if name.split(".")[0] == "veneer"} - upwards
    assert {name for name in ours if not _allowed(name, part)} == set()


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[len(SOURCE.parts)] in BELOW], ids=_name)
def test_core_needs_torch_and_safetensors_only(path):
    assert {name for name in _imports(path) if name.split(".")[0] not in CORE_NEEDS} == set()


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_files_and_functions_are_small_and_well_named(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= FUNCTION_LINES}
    assert long == {}
    assert not DRAWERS & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}


@pytest.mark.parametrize(
    ("name", "part", "allowed"),
    [
        ("veneer.core.errors", "zoo", True),
        ("veneer.core.model", "zoo", False),
        ("veneer.core.errors", "train", True),
        ("veneer.cli.pull", "train", False),
        ("veneer.cli", "", False),
        ("veneer.train.loop", "core", False),
        ("veneer.LoraConfig", "zoo", False),
        ("veneer.zoo", "train", True),
    ],
)
def test_the_table_is_read_right(name, part, allowed):
    assert _allowed(name, part) == allowed
