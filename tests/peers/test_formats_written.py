"""What veneer writes loads everywhere: the peers find the formula's changes in it, those included that misread others.

The exporters leave a peer nothing to misread: kohya's files have one α, diffusers' have the scale in B and a header.
"""

import pytest
from safetensors import safe_open

import veneer.files
from peers.pipelines import wrong
from peers.round_trip import SOURCES, there_and_back
from peers.sides import PEERS, through_veneer
from peers.table import CASES
from veneer import AdapterError

WRITTEN = [  # what is read, as what it is written, and who reads that
    ("kohya: sd1", "diffusers", "diffusers"),
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
    ("lycoris: LoCon with cores", "kohya", "lycoris"),
    ("lycoris: LoHa", "lycoris", "lycoris"),
    ("lycoris: LoHa with cores", "lycoris", "lycoris"),
    ("lycoris: LoKr in four factorisations", "lycoris", "lycoris"),
    ("lycoris: whole differences", "lycoris", "lycoris"),
    ("lycoris: norms", "lycoris", "lycoris"),
    ("lycoris: no alpha", "lycoris", "lycoris"),
    ("lycoris: DoRA on LoHa and LoKr", "lycoris", "lycoris"),
    ("cloneofsimo: sd1, feed-forward before cross-attention", "kohya", "diffusers"),
    ("peft: linear layers", "peft", "peft"),
    ("peft: rsLoRA", "peft", "peft"),
    ("peft: DoRA", "peft", "peft"),
    ("peft: biases of B", "peft", "peft"),
    ("peft: an embedding", "peft", "peft"),
    ("peft: modules_to_save", "peft", "peft"),
    ("peft: all biases", "peft", "peft"),
]
REFUSED = [
    ("kohya: sd1", "cloneofsimo"),  # it has one scale, 1, and the attention layers alone
    ("kohya: sd1, DoRA by input", "diffusers"),
    ("kohya: sd1, DoRA by input", "peft"),
    ("lycoris: LoHa", "diffusers"),
    ("lycoris: LoHa", "kohya"),
    ("lycoris: norms", "kohya"),
    ("peft: modules_to_save", "kohya"),
    ("peft: an embedding", "lycoris"),
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


@pytest.mark.parametrize(("source", "form"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(source, form, tmp_path):
    case = CASES[source]()
    (tmp_path / "in").mkdir()
    adapter = veneer.files.read(case.write(tmp_path / "in"), **case.asked)
    with pytest.raises(AdapterError):
        veneer.files.write(adapter, tmp_path / "out", form)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("source", SOURCES)
def test_from_kohya_to_diffusers_and_back_the_changes_are_the_same(source, tmp_path):
    """To the bit where every scale is a power of two, or one."""
    case = CASES[source]()
    assert wrong(there_and_back(case, tmp_path), case.wanted, tolerance=SOURCES[source]) == {}


def test_what_kohyas_file_says_of_itself_is_there_after_the_way_back(tmp_path):
    case = CASES["kohya: sd1 with convolutions"]()
    case.metadata["ss_tag_frequency"] = '{"10_cat": {"my cat": 12}}'
    there_and_back(case, tmp_path)
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        assert file.metadata()["ss_tag_frequency"] == case.metadata["ss_tag_frequency"]
