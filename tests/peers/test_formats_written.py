"""What veneer writes loads everywhere: the peers find the formula's changes in it, those included that misread others.

The exporters leave a peer nothing to misread: kohya's files have one α, diffusers' have the scale in B and a header.
"""

import pytest
import torch

import veneer.files
from peers.pipelines import wrong
from peers.round_trip import SOURCES, there_and_back
from peers.sides import PEERS, through_veneer
from peers.table import CASES

WRITTEN = [  # what is read, as what it is written, and who reads that
    ("kohya: sd1", "diffusers", "diffusers"),
    ("kohya: sd1", "kohya", "diffusers"),
    ("kohya: sd1, alpha in some", "kohya", "diffusers"),
    ("kohya: sd1 with convolutions", "kohya", "lycoris"),
    ("kohya: sd1, lora_mid", "diffusers", "diffusers"),
    ("kohya: sd1, lora_mid", "kohya", "diffusers"),
    ("kohya: sd1, DoRA by output", "kohya", "lycoris"),
    ("kohya: sdxl in sgm's words", "diffusers", "diffusers"),
    ("kohya: sdxl in diffusers' words with convolutions", "kohya", "diffusers"),
    ("kohya: sdxl, without text_model", "kohya", "diffusers"),
    ("diffusers: sd1 with a header", "diffusers", "diffusers"),
    ("diffusers: sdxl with a header", "kohya", "diffusers"),
    ("diffusers: sd1, rsLoRA", "kohya", "diffusers"),
    ("diffusers: sd1, rsLoRA", "diffusers", "diffusers"),
    ("diffusers: a transformer with a header", "diffusers", "diffusers"),
    ("lycoris: LoCon with cores", "diffusers", "diffusers"),
    ("lycoris: LoCon with cores", "kohya", "lycoris"),
    ("lycoris: LoHa", "lycoris", "lycoris"),
    ("lycoris: LoHa with cores", "lycoris", "lycoris"),
    ("lycoris: LoKr in four factorisations", "lycoris", "lycoris"),
    ("lycoris: whole differences", "lycoris", "lycoris"),
    ("lycoris: norms", "lycoris", "lycoris"),
    ("lycoris: no alpha", "lycoris", "lycoris"),
    ("lycoris: DoRA on LoHa and LoKr", "lycoris", "lycoris"),
    ("cloneofsimo: sd1, feed-forward before cross-attention", "kohya", "diffusers"),
    ("cloneofsimo: sd1 with convolutions", "diffusers", "diffusers"),
    ("peft: linear layers", "peft", "peft"),
    ("peft: rsLoRA", "peft", "peft"),
    ("peft: DoRA", "peft", "peft"),
    ("peft: biases of B", "peft", "peft"),
    ("peft: an embedding", "peft", "peft"),
    ("peft: modules_to_save", "peft", "peft"),
    ("peft: all biases", "peft", "peft"),
]


@pytest.mark.parametrize(("source", "form", "peer"), WRITTEN)
def test_what_veneer_writes_the_peer_reads(source, form, peer, tmp_path):
    case = CASES[source]()
    (tmp_path / "in").mkdir()
    adapter = veneer.files.read(case.write(tmp_path / "in"), **case.asked)
    target = tmp_path / "out" / ("adapter" if form == "peft" else "adapter.safetensors")
    path = veneer.files.write(adapter, target, form)
    assert veneer.files.detect(path) == form
    assert wrong(PEERS[peer](case, path), case.wanted) == {}
    case.asked = {}
    assert wrong(through_veneer(case, path), case.wanted) == {}


@pytest.mark.parametrize("family", SOURCES)
def test_there_and_back_the_changes_are_the_same(family, tmp_path):
    case = CASES[SOURCES[family]]()
    assert wrong(there_and_back(case, tmp_path), case.wanted, tolerance=1e-6) == {}


def test_there_and_back_they_are_the_same_bits_where_scales_are_powers_of_two(tmp_path):
    case = CASES["kohya: sd1, one rank and alpha"]()
    found = there_and_back(case, tmp_path)
    assert found.keys() == case.wanted.keys()
    assert all(torch.equal(found[name], case.wanted[name]) for name in found)
