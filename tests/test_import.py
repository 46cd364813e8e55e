"""`import veneer` is light, and each public name is where it says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import veneer

LIGHT = {"torch", "safetensors"}
# what torch itself loads when it finds it
WITH_TORCH = {"numpy", "packaging", "typing_extensions", "sympy", "mpmath", "torchgen", "yaml", "functorch"}


def _loaded(code: str) -> set[str]:
    """The top-level modules outside of the standard library that `code` loads in a new interpreter."""
    program = f"import sys\nbefore = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()} - set(sys.stdlib_module_names) - {"veneer"}


def test_importing_the_package_loads_nothing():
    assert _loaded("import veneer; dir(veneer)") == set()


@pytest.mark.parametrize("name", ["LoraConfig", "AdapterError"])
def test_plain_names_load_torch_at_most(name):
    assert _loaded(f"import veneer; veneer.{name}") <= LIGHT | WITH_TORCH


def test_the_model_loads_torch_and_safetensors_only():
    heavy = _loaded("import veneer; veneer.get_peft_model, veneer.Adapter, veneer.PeftModel") - _loaded("import torch")
    assert heavy <= LIGHT


def test_saving_and_loading_need_torch_and_safetensors_only(tmp_path):
    made = "veneer.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), veneer.LoraConfig(target_modules=['0']))"
    moves = f"model = {made}; model.save_pretrained({str(tmp_path)!r}); model.load_adapter({str(tmp_path)!r}, 'again')"
    assert _loaded(f"import torch, veneer; {moves}") - _loaded("import torch") <= LIGHT | WITH_TORCH


@pytest.mark.parametrize("name", veneer.__all__)
def test_each_public_name_resolves(name):
    value = getattr(veneer, name)
    assert getattr(value, "__name__", name).removeprefix("veneer.") == name or name == "__version__"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'veneer' has no attribute 'LoraKonfig'"):
        _ = veneer.LoraKonfig


def test_the_public_names_are_declared_once_each_way():
    tree = ast.parse(Path(veneer.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(veneer._HOMES)
    assert sorted(veneer.__all__) == sorted({*veneer._HOMES, "__version__"}) == dir(veneer)
