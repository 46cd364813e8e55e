"""The README's Python runs, and its recipe is one."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's code blocks in that language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipe_is_one(text, tmp_path):
    from veneer.train.run import read_recipe

    (tmp_path / "readme.yaml").write_text(text, encoding="utf-8")
    recipe, _ = read_recipe(str(tmp_path / "readme.yaml"))
    assert recipe.data.prompt.startswith("Facts")
