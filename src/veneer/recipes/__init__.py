"""Recipes: YAML files found by name or path, extended, overridden. What their keys mean is the tasks' business."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from veneer.core.errors import AdapterError, nearest

SHIPPED = Path(__file__).parent
ENDINGS = (".yaml", ".yml")


def names() -> list[str]:
    """The shipped recipes; those whose file begins with `_` are only there to be extended."""
    paths = (path for path in SHIPPED.rglob("*.yaml") if not path.name.startswith("_"))
    return sorted((path.relative_to(SHIPPED).with_suffix("").as_posix() for path in paths), key=lambda n: ("/" in n, n))


def summary(name: str) -> str:
    """A shipped recipe's first comment."""
    first = find(name).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def find(name: str, beside: Path | None = None) -> Path:
    """The file of a recipe: a path (also as seen from the folder `beside`), or the name of a shipped one."""
    for path in (Path(name).expanduser(), *([beside / name] if beside else [])):
        if path.is_file():
            return path
    if (SHIPPED / f"{name}.yaml").is_file():
        return SHIPPED / f"{name}.yaml"
    if name.endswith(ENDINGS) or "/" in name:
        folder = Path(name).parent
        there = [str(path) for path in folder.glob("*") if path.suffix in ENDINGS] if folder.is_dir() else []
        raise AdapterError(f"recipe {name}: there is no such file{nearest(name, there)}")
    raise AdapterError(f"recipe {name!r} is neither a file nor one of {', '.join(names())}{nearest(name, names())}")


def load(name: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The recipe as plain values: what it extends, then its own keys, then `key.sub=value` overrides."""
    return overridden(_read(find(name), ()), overrides)


def overridden(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The values with `key.sub=value` overrides in their place."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise AdapterError(f"override {override!r}: expected key.sub=value")
        values = merged(values, _nested(key.split("."), _typed(text)))
    return values


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`under` with the values of `over` in its place; mappings are merged, everything else is replaced."""
    both = dict(under)
    for key, value in over.items():
        below = both.get(key)
        both[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return both


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe file with what it extends."""
    if path.resolve() in seen:
        raise AdapterError(f"recipe {path} extends itself: {' → '.join(map(str, [*seen, path]))}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"recipe {path} cannot be read: {error}") from error
    values = _parsed(text, f"recipe {path}")
    if not isinstance(values, dict):
        raise AdapterError(f"recipe {path}: expected keys and values, found {type(values).__name__}")
    values = _placed(values, path.parent)
    extended = values.pop("extend", None) or []
    parents = [extended] if isinstance(extended, str) else extended
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise AdapterError(f"recipe {path}: extend names a recipe or a list of them, found {extended!r}")
    under: dict[str, Any] = {}
    for parent in parents:
        under = merged(under, _read(find(parent, path.parent), (*seen, path.resolve())))
    return merged(under, values)


def _placed(values: Any, folder: Path) -> Any:
    """`recipe:data/x.jsonl` → the file beside the recipe that says so."""
    if isinstance(values, dict):
        return {key: _placed(value, folder) for key, value in values.items()}
    if isinstance(values, str) and values.startswith("recipe:"):
        return str((folder / values.removeprefix("recipe:")).resolve())
    return values


def _nested(keys: list[str], value: Any) -> Any:
    return {keys[0]: _nested(keys[1:], value)} if keys else value


def _typed(text: str) -> Any:
    """A value as typed on the command line: YAML where it is plainly meant, else the text to the letter.

    `{facts}` and `Facts: {facts}` are texts; `{q_proj: 8}` and `[q_proj]` are not.
    """
    try:
        value = _parsed(text, text)
    except AdapterError:
        return text
    written_out = text.startswith(("{", "[", "'", '"'))
    if isinstance(value, dict) and (not written_out or None in value.values()):
        return text
    if isinstance(value, (str, list)) and not written_out:
        return text
    return value if isinstance(value, (str, int, float, list, dict, type(None))) else text  # a date, say


def _parsed(text: str, what: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise AdapterError("reading a recipe needs: pip install 'veneer[train]'") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}, column {place.column + 1}" if place else ""
        raise AdapterError(f"{what}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
