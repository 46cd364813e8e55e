"""Drawn pictures and tiny bases, made once."""

from pathlib import Path

import pytest

from train.vision.drawing import draw_all, tiny


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """The folder of 60 pictures."""
    return draw_all(tmp_path_factory.mktemp("shapes"), 60)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """`base("vit")` → the folder of a tiny one."""
    folder = tmp_path_factory.mktemp("seeing")
    return lambda name: tiny(name, folder / name)
