"""The Python of the README and of docs runs, and the README's recipe is one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, *pages: Path) -> list[str]:
    """The pages' code blocks in that language."""
    texts = [page.read_text(encoding="utf-8") for page in pages]
    return [block for text in texts for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("code", blocks("python", *PAGES))
def test_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "a page", "exec"), {})


@pytest.mark.parametrize("text", blocks("yaml", ROOT / "README.md"))
def test_recipe_is_one(text, tmp_path):
    from veneer.train.run import read_recipe

    (tmp_path / "readme.yaml").write_text(text, encoding="utf-8")
    recipe, _ = read_recipe(str(tmp_path / "readme.yaml"))
    assert recipe.data.prompt.startswith("Facts")
