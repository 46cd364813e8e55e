"""The list of settings that a recipe may have."""

from dataclasses import fields

from veneer import LoraConfig
from veneer.train.settings import MEANINGS


def test_every_field_of_an_adapter_has_a_meaning():
    assert {field.name for field in fields(LoraConfig)} == set(MEANINGS)
