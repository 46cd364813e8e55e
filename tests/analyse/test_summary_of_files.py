"""Whatever the format, norms are those of the change that the file was made from."""

import pytest

from peers.table import CASES
from veneer import files
from veneer.analyse.summary import summary


def bare(name: str) -> str:
    """A weight's name without the level of CLIP's that versions spell otherwise."""
    return name.replace("text_model.", "")


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("peft: rsLoRA", {"rsLoRA"}),
        ("peft: modules_to_save", {"LoRA", "saved whole", "bias"}),
        ("kohya: sd1, alpha in some", {"LoRA"}),
        ("kohya: sdxl in sgm's words with convolutions", {"LoRA"}),
        ("diffusers: a transformer with a header", {"LoRA"}),
        ("lycoris: LoHa with cores", {"LoHa"}),
        ("lycoris: LoKr in four factorisations", {"LoKr"}),
        ("lycoris: many methods", {"LoRA", "full difference", "LoKr", "LoHa"}),
        ("cloneofsimo: sd1 with convolutions", {"LoRA"}),
    ],
)
def test_norms_are_the_formulas(name, methods, tmp_path):
    case = CASES[name]()
    found = summary(files.read(case.write(tmp_path), **case.asked))
    wanted = {bare(weight).removesuffix(".weight"): change.norm().item() for weight, change in case.wanted.items()}
    assert {*found.counts("method")} == methods
    told = {path: norm for path, norm in found.values.norms.items() if norm is not None}
    assert len(told) == sum(layer.method not in ("saved whole", "bias") for layer in found.layers.values())
    for path, norm in told.items():
        (expected,) = [own for weight, own in wanted.items() if f".{weight}".endswith(f".{bare(path)}")]
        assert norm == pytest.approx(expected, rel=1e-5)
    assert found.faults == ()
