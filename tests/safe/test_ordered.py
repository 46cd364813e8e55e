"""Files whose bytes depend on their content alone."""

import json

import torch
from safetensors.torch import load_file

from veneer.safe.ordered import save_ordered

ABOUT = {word: f'{word} \n\t"ü☃" \u0001' for word in ["format", "base_model", "family", "trigger", "zebra", "apple"]}


def test_what_a_file_says_of_itself_stands_in_the_order_of_the_alphabet(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7), "c.d": torch.randn(2).bfloat16()}
    save_ordered(tensors, path := tmp_path / "x.safetensors", ABOUT)
    save_ordered(dict(reversed(tensors.items())), other := tmp_path / "y.safetensors", dict(reversed(ABOUT.items())))
    assert other.read_bytes() == path.read_bytes()
    held = path.read_bytes()
    size = int.from_bytes(held[:8], "little")
    said = json.loads(held[8 : 8 + size])["__metadata__"]
    assert said == ABOUT
    assert list(said) == sorted(ABOUT)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], own) for name, own in tensors.items())
