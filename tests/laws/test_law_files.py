"""Files: save → load gives identical outputs and bits; every fault is named in one error, and nothing is changed."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer import Adapter, AdapterError, PeftModel
from veneer.files import folder as own_folder

_KEY = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_save_then_load_gives_identical_outputs_and_bits(case, bits, tmp_path, dtype):
    settings = {
        "use_rslora": True,
        "rank_pattern": {"head": 1},
        "alpha_pattern": {"head": 0.5},
        "lora_dropout": 0.1 * case.kind.drops,
    }
    base = case.stack(dtype)
    saved = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model, x = case.adapted(base=base, targets=["layer", "head"], **settings), case.x(3, dtype=dtype)
    assert model.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [CONFIG, WEIGHTS]

    other = case.stack(dtype)
    other.load_state_dict(saved)
    before = torch.get_rng_state()
    other = PeftModel.from_pretrained(other, tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():  # attention has another path where nothing learns
        assert torch.equal(other(x), model(x))
    assert all(bits(other)[key] == bits(model)[key] for key in saved)
    found, wanted = other.get_adapter(), model.get_adapter()
    assert found.config == other.peft_config["default"] == replace(wanted.config, init_lora_weights=True)
    assert found.embeddings == wanted.embeddings
    torch.testing.assert_close(found.tensors, wanted.tensors, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_saving_while_merged_or_blended_writes_the_same_file(case, tmp_path):
    model = case.adapted("a", "b")
    model.save_pretrained(tmp_path / "live", "b")
    model.merge_adapter(["a", "b"])
    model.save_pretrained(tmp_path / "merged", "b")
    assert (tmp_path / "live" / WEIGHTS).read_bytes() == (tmp_path / "merged" / WEIGHTS).read_bytes()
    with pytest.raises(AdapterError, match=r"which adapter.*'a', 'b'"):
        model.save_pretrained(tmp_path / "which")


@pytest.fixture
def folder(case, tmp_path):
    case.adapted(base=case.stack(), targets=["layer", "head"]).save_pretrained(tmp_path)
    return tmp_path


def _rewrite_tensors(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def _refused(case, bits, folder) -> str:
    """What both ways to load say; and neither may change the model."""
    first, second = case.stack(), case.adapted("a", base=case.stack(), targets=["head"])
    before, kinds = (bits(first), bits(second)), [type(module) for module in (*first.modules(), *second.modules())]
    said = []
    for load in (lambda: PeftModel.from_pretrained(first, folder), lambda: second.load_adapter(folder, "b")):
        with pytest.raises(AdapterError) as error:
            load()
        said.append(str(error.value))
    assert said[0] == said[1]
    assert (bits(first), bits(second)) == before
    assert [type(module) for module in (*first.modules(), *second.modules())] == kinds
    assert all(parameter.requires_grad for parameter in first.parameters())
    assert list(second.peft_config) == ["a"]
    return said[0]


def test_every_tensor_that_does_not_fit_is_named_in_one_error(case, bits, folder):
    def change(tensors) -> None:
        of = {path: sorted(key for key in tensors if key.startswith(_KEY + path)) for path in ("layer", "head")}
        del tensors[of["layer"][0]]
        tensors[of["head"][0].replace("head", "nobody")] = torch.zeros(1)
        tensors[of["head"][-1]] = torch.zeros(7, 9)

    _rewrite_tensors(folder, change)
    said = _refused(case, bits, folder)
    for part in ("missing: layer.", "unexpected: nobody.", "of another shape: head."):
        assert part in said


def test_tensors_that_no_method_knows_and_nan_are_named_in_one_error(case, bits, folder):
    flat = load_file(folder / WEIGHTS)
    key = next(key for key in flat if "layer" in key)
    tensors = Adapter.load(folder).tensors.items()
    name = next(f"{path}.{name}" for path, own in tensors for name, t in own.items() if torch.equal(t, flat[key]))
    _rewrite_tensors(folder, lambda t: t.update({"stranger.weight": torch.zeros(1), key: t[key] * float("nan")}))
    said = _refused(case, bits, folder)
    assert "unexpected tensors: stranger.weight" in said
    assert f"NaN or infinity in: {name}" in said


def test_faults_of_the_config_of_the_file_and_of_the_fit_are_in_one_error(case, bits, folder):
    key = next(key for key in load_file(folder / WEIGHTS) if key.startswith(f"{_KEY}layer."))
    _rewrite_tensors(folder, lambda t: t.update({"stranger": torch.zeros(1), "x.y": t.pop(key)}))
    _config(folder, use_bdlora={}, use_qalora=True, lora_alfa=3)
    said = _refused(case, bits, folder)
    for part in ("use_bdlora={}", "use_qalora=True", "lora_alfa=3; did you mean", "stranger", "x.y", "missing: layer."):
        assert part in said
    _config(folder, exclude_modules=["heat"], target_modules=["layr"], rank_pattern={"nobody": 2}, r="x")
    assert "r should be" in _refused(case, bits, folder)
    _config(folder, r=2)
    said = _refused(case, bits, folder)
    for part in ("'layr' matches no module", "'heat' matches no module", "'nobody' matches no adapted layer"):
        assert part in said


@pytest.mark.parametrize("name", ["weight", "layer", "head", "A", "default", "bias"])
def test_an_adapter_may_be_called_as_a_module_is(case, tmp_path, name):
    model, x = case.adapted(name, base=case.stack(), targets=["layer", "head"]), case.x(3)
    with torch.no_grad():  # attention has another path where nothing learns
        expected, base = model(x), case.stack()
    model.save_pretrained(tmp_path)
    base.load_state_dict({key: t for key, t in model.state_dict().items() if ".adapters." not in key})
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path, name)(x), expected)


@pytest.mark.parametrize("name", ["a.b", "", "plan", "keys", "forward", "training", 3, None])
def test_a_name_that_cannot_be_is_refused(case, bits, folder, name):
    model = case.stack()
    before = bits(model)
    with pytest.raises(AdapterError, match="cannot be an adapter's name"):
        PeftModel.from_pretrained(model, folder, name)
    assert bits(model) == before


def _config(folder, **values: object) -> None:
    old = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**old, **values}))


DAMAGE = {
    "truncated weights": (lambda f: os.truncate(f / WEIGHTS, 50), "not a whole safetensors file"),
    "empty weights": (lambda f: os.truncate(f / WEIGHTS, 0), "not a whole safetensors file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}; it holds {CONFIG}"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"no {CONFIG}; it holds {WEIGHTS}"),
    "truncated config": (lambda f: os.truncate(f / CONFIG, 20), "not valid JSON"),
    "binary config": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "deep config": (lambda f: (f / CONFIG).write_text("[" * 10**5), "not valid JSON"),
    "list for config": (lambda f: (f / CONFIG).write_text("[]"), "expected a JSON object, found list"),
    "unknown method": (lambda f: _config(f, peft_type="LORRA"), "'LORRA' is not a method of veneer"),
    "bad numbers": (lambda f: _config(f, r=0, lora_alpha="x"), "r should be .* found 0; lora_alpha should be"),
    "not built": (
        lambda f: _config(f, layer_replication=[[0, 1]], use_qalora=True),
        r"layer_replication=.* is not supported.*; use_qalora=True is",
    ),
    "no such modules": (lambda f: _config(f, modules_to_save=["heat"]), "modules_to_save: 'heat' .* mean 'head'"),
    "other targets": (lambda f: _config(f, target_modules=["heat"]), "'heat' matches no module; did you mean 'head'"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_changes_nothing(case, bits, folder, damage, said):
    damage(folder)
    assert re.search(said, _refused(case, bits, folder))


def test_a_folder_that_is_not_there_is_named_with_the_nearest(case, folder):
    (folder / "french").mkdir()
    with pytest.raises(AdapterError, match=r"frensh does not exist; did you mean .*french"):
        Adapter.load(folder / "frensh")


def test_unknown_keys_are_warned_of_and_what_changes_nothing_is_not(case, folder):
    _config(folder, loftq_config={}, peft_version="0.99", new_flag=None, other_flag=False)
    Adapter.load(folder)
    _config(folder, lora_alfa=3)
    with pytest.warns(
        UserWarning, match="unknown keys are kept, and say nothing here: lora_alfa=3; did you mean 'lora_alpha'"
    ):
        adapter = Adapter.load(folder)
    assert adapter.config.unknown == {"lora_alfa": 3, "new_flag": None, "other_flag": False}
    with pytest.warns(UserWarning, match="unknown keys"):
        assert Adapter.load(adapter.save(folder)).config == adapter.config


@pytest.mark.parametrize("failing", ["open", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_files_whole(case, folder, monkeypatch, failing):
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    model = case.adapted(base=case.stack(), targets=["layer", "head"])
    monkeypatch.setattr(os, failing, no_space)
    with pytest.raises(AdapterError, match=r"cannot write the adapter to .*No space left"):
        model.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_a_write_that_is_interrupted_leaves_the_old_files_whole(case, folder, monkeypatch):
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def interrupted(_: object, path: str, __: object) -> None:
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(own_folder, "save_ordered", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Adapter.load(folder).save(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_a_place_that_cannot_be_written_is_named(case, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match=r"cannot write the adapter to .*file"):
        case.adapted().save_pretrained(tmp_path / "file")
