"""`veneer combine`, `resize` and `extract`: files in, a file and a table out, nothing overwritten."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer import Adapter, LoraConfig
from veneer.apart.changes import changes

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")


def saved(folder, r: int) -> Adapter:
    tensors = {path: {"A": torch.randn(r, 10), "B": torch.randn(12, r)} for path in PATHS}
    adapter = Adapter(LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(PATHS)), tensors)
    adapter.save(folder)
    return adapter


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {path: own.update().delta(torch.empty(12, 10, device="meta")) for path, own in changes(adapter).items()}


@pytest.fixture
def pair(tmp_path):
    return saved(tmp_path / "a", 2), saved(tmp_path / "b", 3)


def test_a_sum(veneer, tmp_path, pair):
    said = veneer("combine", f"{tmp_path / 'a'}:0.7", f"{tmp_path / 'b'}:-0.3", "--out", tmp_path / "c")
    assert (said.code, said.err) == (0, "")
    assert "attention q" in said.out
    assert f"{tmp_path / 'c'} (peft)" in said.out.replace("\n", "")
    one, other = map(deltas, pair)
    for path, delta in deltas(Adapter.load(tmp_path / "c")).items():
        torch.testing.assert_close(delta, 0.7 * one[path] - 0.3 * other[path])


def test_what_is_thinned_out_gets_the_largest_rank_and_its_error_is_told(veneer, tmp_path, pair):
    given = [tmp_path / "a", tmp_path / "b", "--how", "ties", "--density", "0.5"]
    said = veneer("combine", *given, "--out", tmp_path / "c")
    assert said.code == 0
    assert {own.config.r for own in changes(Adapter.load(tmp_path / "c")).values()} == {3}
    assert "%" in said.out.splitlines()[-2]
    said = veneer("combine", *given, "--full", "--out", tmp_path / "d")
    assert "veneer's own folder: PEFT has no adapter of FULL" in said.out
    assert {own.config.peft_type for own in changes(Adapter.load(tmp_path / "d")).values()} == {"FULL"}


def test_nothing_is_overwritten_without_force(veneer, tmp_path, pair):
    before = load_file(tmp_path / "b" / "adapter_model.safetensors")
    for command in (
        ["combine", tmp_path / "a", tmp_path / "b"],
        ["resize", tmp_path / "a", "--rank", "1"],
    ):
        said = veneer(*command, "--out", tmp_path / "b")
        assert said.code == 2
        assert "exists already; nothing was written" in said.err
    after = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert veneer("resize", tmp_path / "a", "--rank", "1", "--out", tmp_path / "b", "--force").code == 0
    assert Adapter.load(tmp_path / "b").config.r == 1


def test_block_weights_of_a_kohya_file(veneer, tmp_path):
    from veneer import files

    paths = [
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_q",
    ]
    tensors = {path: {"A": torch.randn(2, 10), "B": torch.randn(12, 2)} for path in paths}
    config = LoraConfig(r=2, lora_alpha=1, target_modules=paths)
    adapter = Adapter(config, tensors, metadata={"ss_tag": "x"}, parts=("unet", "text_encoder"))
    files.write(adapter, tmp_path / "a.safetensors", "kohya")
    said = veneer(
        "combine", f"{tmp_path / 'a.safetensors'}:2", "--blocks", "IN04=0.5,OUT11=-1",
        "--out", tmp_path / "b.safetensors",
    )  # fmt: skip
    assert said.code == 0, said.err
    found = files.read(tmp_path / "b.safetensors")
    assert files.detect(tmp_path / "b.safetensors") == "kohya"
    assert found.metadata["ss_tag"] == "x"
    wanted, before = deltas(found), deltas(adapter)
    for path, weight in zip(paths, (2.0, 1.0, -2.0), strict=True):
        torch.testing.assert_close(wanted[path], weight * before[path])


def test_resize(veneer, tmp_path, pair):
    said = veneer("resize", tmp_path / "b", "--energy", "0.8", "--dtype", "float16", "--out", tmp_path / "c")
    assert said.code == 0
    found = Adapter.load(tmp_path / "c")
    assert found.tensors[PATHS[0]]["A"].dtype == torch.float16
    for path, delta in deltas(pair[1]).items():
        S = torch.linalg.svdvals(delta)
        wanted = int((S.square().cumsum(0) < 0.8 * S.square().sum()).sum()) + 1
        assert changes(found)[path].config.r == wanted


def test_extract(veneer, tmp_path, pair):
    one = deltas(pair[0])
    base = {f"{path}.weight": torch.randn(12, 10) for path in PATHS} | {"norm.weight": torch.ones(4)}
    tuned = {name: W + one.get(name.removesuffix(".weight"), 0.5) for name, W in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    models = [tmp_path / "tuned.safetensors", tmp_path / "base.safetensors"]
    said = veneer("extract", *models, "--rank", "2", "--out", tmp_path / "c")
    assert said.code == 0
    assert "differ and are not in the adapter: norm.weight" in said.err
    torch.testing.assert_close(deltas(Adapter.load(tmp_path / "c")), one, rtol=1e-4, atol=1e-5)
    save_file({f"model.layers.0.{name}": W for name, W in base.items()}, tmp_path / "language.safetensors")
    said = veneer(
        "extract", *[tmp_path / "language.safetensors"] * 2, "--rank", "2", "--out", tmp_path / "d.safetensors"
    )
    assert said.code == 2
    assert "kohya files are of image models" in said.err


def test_extract_from_whole_checkpoints_of_stable_diffusion(veneer, tmp_path):
    block, clip = "model.diffusion_model.input_blocks.4.1.", "cond_stage_model.transformer.text_model.encoder.layers.0."
    names = {
        f"{block}transformer_blocks.0.attn1.to_q.weight": (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        f"{clip}self_attn.q_proj.weight": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "first_stage_model.decoder.conv_in.weight": None,
    }
    base = {name: torch.randn(8, 6) for name in names}
    tuned = {name: W + torch.randn(8, 1) @ torch.randn(1, 6) for name, W in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    said = veneer(
        "extract", tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", "--rank", "1", "--out",
        tmp_path / "x.safetensors",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "first_stage_model" in said.err
    from veneer import files

    found = files.read(tmp_path / "x.safetensors")
    assert found.tensors.keys() - {""} == {path for path in names.values() if path}
    assert set(found.parts) == {"unet", "text_encoder"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["combine", "a:x", "--out", "c"], "expected ADAPTER or ADAPTER:WEIGHT"),
        (["combine", "a", "b", "--how", "tie", "--out", "c"], "did you mean 'ties'"),
        (["combine", "a", "b", "--out", "c", "--to", "kohya"], "for kohya name a file"),
        (["combine", "a", "b", "--out", "c.safetensors"], "say its format"),
        (["combine", "a", "b", "--blocks", "OUTD", "--out", "c"], "block weights are for the UNet"),
        (["resize", "a", "--out", "c"], "say how much to keep"),
        (["resize", "a", "--rank", "2", "--dtype", "int8", "--out", "c"], "expected one of float32"),
        (["extract", "a", "b", "--out", "c"], "--rank, --energy or --ratio"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(veneer, tmp_path, pair, monkeypatch, command, said):
    monkeypatch.chdir(tmp_path)
    found = veneer(*command)
    assert found.code == 2
    assert said in found.err
    assert not (tmp_path / "c").exists()
