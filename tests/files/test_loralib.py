"""loralib: what its own layers compute is what veneer reads, and what veneer writes is what they compute."""

import loralib
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from veneer import AdapterError, files
from veneer.apart.changes import Change, adapter_of, changes
from veneer.core.config import LoraConfig

ALPHA = 3.0
QV = [True, False, True]


class _Theirs(nn.Module):
    """A layer of every kind of theirs, with its base's weights and random factors."""

    def __init__(self):
        super().__init__()
        self.table = loralib.Embedding(9, 6, r=2, lora_alpha=ALPHA)
        self.fc = loralib.Linear(6, 5, r=3, lora_alpha=ALPHA, fan_in_fan_out=True)
        self.qkv = loralib.MergedLinear(6, 12, r=2, lora_alpha=ALPHA, enable_lora=QV)
        self.every = loralib.MergedLinear(6, 8, r=2, lora_alpha=ALPHA, enable_lora=[True, True])
        self.one = loralib.MergedLinear(6, 8, r=2, lora_alpha=ALPHA, enable_lora=[False, True])
        self.conv = loralib.Conv2d(4, 6, 3, r=2, lora_alpha=ALPHA)
        self.point = loralib.Conv2d(4, 6, 1, r=2, lora_alpha=ALPHA)
        for name, parameter in self.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)


class _Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(9, 6), nn.Linear(6, 5)
        self.qkv, self.every, self.one = nn.Linear(6, 12), nn.Linear(6, 8), nn.Linear(6, 8)
        self.conv, self.point = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 1)


@pytest.fixture
def theirs():
    return _Theirs()


def _weight(layer):
    weight = getattr(layer, "conv", layer).weight.detach().clone()
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight


def _wanted(theirs):
    """What their merge adds to each weight."""
    before = {name: _weight(layer) for name, layer in theirs.named_children()}
    theirs.eval()
    return {name: _weight(layer) - before[name] for name, layer in theirs.named_children()}


def _expect(adapter, wanted):
    base = _Base()
    before = {name: layer.weight.detach().clone() for name, layer in base.named_children()}
    merged = files.attach(base, adapter).merge_and_unload()
    for name, change in wanted.items():
        found = merged.get_submodule(name).weight.detach() - before[name]
        torch.testing.assert_close(found, change, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("told", ["in words", "by the model"])
def test_every_kind_of_theirs_is_read_as_it_merges(theirs, tmp_path, told):
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "lora.pt")
    enabled = {"qkv": QV, "one": [False, True]}
    more = {"kernels": {"conv": 3}} if told == "in words" else {"model": _Base()}
    enabled |= {"every": [True, True]} if told == "in words" else {}
    adapter = files.read(tmp_path / "lora.pt", alpha=ALPHA, enable_lora=enabled, **more)
    assert files.detect(tmp_path / "lora.pt") == "loralib"
    assert adapter.embeddings == ({"table"} if told == "by the model" else set())
    _expect(adapter, _wanted(theirs))


def test_biases_come_along(theirs, tmp_path):
    own = {name: tensor for name, tensor in loralib.lora_state_dict(theirs).items() if name.startswith("fc")}
    save_file({**own, "fc.bias": torch.randn(5)}, tmp_path / "one")
    base = _Base()
    merged = files.attach(base, files.read(tmp_path / "one", alpha=ALPHA)).merge_and_unload()
    torch.testing.assert_close(merged.fc.bias.detach(), load_file(tmp_path / "one")["fc.bias"])


def test_what_is_written_is_what_their_layers_compute(tmp_path):
    shapes = {"table": (9, 6), "fc": (6, 5), "qkv": (6, 12), "point": (4, 6)}
    every = {}
    for place, (name, (columns, rows)) in enumerate(shapes.items()):
        config = LoraConfig(r=2 + place % 2, lora_alpha=1 + place, use_rslora=True)
        point = (1, 1) if name == "point" else ()
        tensors = {"A": torch.randn(config.r, columns, *point), "B": torch.randn(rows, config.r, *point)}
        every[name] = Change(config, tensors)
    conv = {"A": torch.randn(3, 4, 3, 3), "B": torch.randn(6, 3, 1, 1)}
    every["conv"] = Change(LoraConfig(r=3, lora_alpha=6, use_rslora=True), conv)
    path = files.write(adapter_of(every), tmp_path / "own.safetensors", "loralib")
    flat = load_file(path)

    theirs = nn.Module()
    theirs.table = loralib.Embedding(9, 6, r=2, lora_alpha=2)
    theirs.fc = loralib.Linear(6, 5, r=3, lora_alpha=3)
    theirs.qkv = loralib.Linear(6, 12, r=2, lora_alpha=2)
    theirs.point = loralib.Conv2d(4, 6, 1, r=3, lora_alpha=3)
    theirs.conv = loralib.Conv2d(4, 6, 3, r=3, lora_alpha=3)
    assert set(theirs.load_state_dict(flat, strict=False).unexpected_keys) == set()
    wanted = {}
    for name, change in every.items():
        delta = change.update().delta(torch.empty(1, device="meta"))
        wanted[name] = delta.T if name == "table" else delta.view(_weight(theirs.get_submodule(name)).shape)
    torch.testing.assert_close(_wanted(theirs), wanted, rtol=1e-4, atol=1e-5)
    again = files.read(path)
    assert {name: change.config.r for name, change in changes(again).items()} == {
        name: change.config.r for name, change in every.items()
    }
    _expect(again, wanted)


def test_what_it_does_not_say_is_asked_for_all_at_once(theirs, tmp_path):
    flat = loralib.lora_state_dict(theirs)
    save_file({**flat, "fc.weight": torch.randn(5, 6), "lone.lora_A": torch.randn(2, 6)}, tmp_path / "one")
    with pytest.raises(AdapterError) as told:
        files.read(tmp_path / "one", kernels={"konv": 3})
    for what in (
        "alpha=… or --alpha",
        "unexpected tensors (save lora.lora_state_dict(model) alone): fc.weight",
        "only one of lora_A and lora_B: lone",
        "'konv' matches no layer of the file; did you mean 'conv'?",
        "qkv: lora_A (4, 6) and lora_B (8, 2) are 2 parts of a MergedLinear",
    ):
        assert what in str(told.value)


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"enable_lora": [True, True, True]}, "are 2 parts"),
        ({"enable_lora": QV, "alpha": "x"}, "alpha should be a number"),
        ({"enable_lora": QV, "kernels": {"fc": 2}}, "not those of a convolution"),
        ({"enable_lora": QV, "beta": 2}, "'beta'"),
    ],
)
def test_what_is_told_wrongly_is_refused(theirs, tmp_path, asked, what):
    save_file(loralib.lora_state_dict(theirs), tmp_path / "one")
    with pytest.raises(AdapterError, match=what):
        files.read(tmp_path / "one", **{"alpha": ALPHA, **asked})


def test_kernels_that_loralib_has_not_are_refused(tmp_path):
    tensors = {"A": torch.randn(2, 4, 3, 1), "B": torch.randn(6, 2, 1, 1)}
    with pytest.raises(AdapterError, match="square kernels"):
        files.write(adapter_of({"conv": Change(LoraConfig(r=2), tensors)}), tmp_path / "one", "loralib")
    assert not list(tmp_path.iterdir())
