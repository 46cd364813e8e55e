"""The same adapter gives the same pictures in veneer and in plain diffusers, from the folder that a run leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from train.diffusion.pipelines import made, saved
from veneer import LoraConfig, PeftModel, files
from veneer.core.adapter import Adapter
from veneer.files.pipeline import load_pipeline, merge_pipeline
from veneer.train.diffusion.family import family_of
from veneer.train.diffusion.kept import adapter_of_parts, keep
from veneer.train.diffusion.parts import adapted
from veneer.train.diffusion.settings import EncoderSettings

CASES = [("sd1", False), ("sd1", True), ("sd2", False), ("sdxl", False), ("wuerstchen-prior", False)]
SAME = 2e-4  # of pictures' numbers, 0 to 1: a twentieth of the step from one of 256 to the next
MOVED = 0.02


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Any:
    place = tmp_path_factory.mktemp("bases")
    known: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        known[kind] = known.get(kind) or saved(kind, place / kind)
        return known[kind]

    return folder


def learned(folder: Path, dora: bool = False, **more: object) -> tuple[PeftModel, Any]:
    """Parts with an adapter of random factors, as if it had learned, and their pipeline."""
    family = family_of(folder).load(folder, None, torch.device("cpu"))
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "attention", "use_dora": dora, **more})
    model = adapted(family, config, EncoderSettings(r=2, lora_alpha=3, target_modules="kohya"))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("magnitude"):
            parameter.data *= torch.rand_like(parameter) + 0.5
    return model.eval(), family.pipeline()


@torch.no_grad()
def drawn(pipeline: Any) -> Tensor:
    """A picture, in numbers of 0 to 1; of a prior, the one that a decoder makes of its latents."""
    pipeline.set_progress_bar_config(disable=True)
    source, steps = torch.Generator().manual_seed(0), {"num_inference_steps": 2}
    if not hasattr(pipeline, "prior"):
        picture = pipeline("a red apple", height=32, width=32, generator=source, output_type="np", **steps).images
        return torch.from_numpy(picture)
    latents = pipeline("a red apple", height=128, width=128, generator=source, **steps).image_embeddings
    again = torch.Generator().manual_seed(1)
    picture = made("wuerstchen-decoder")(latents, "a red apple", generator=again, output_type="np", **steps).images
    return torch.from_numpy(picture)


def plain(folder: Path) -> Any:
    """The pipeline as diffusers itself loads it, where it can."""
    from diffusers import DiffusionPipeline

    if folder.name.startswith("wuerstchen"):
        return load_pipeline(folder)
    return DiffusionPipeline.from_pretrained(folder)


def far(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize(("kind", "dora"), CASES, ids=str)
def test_a_runs_folder_is_read_by_plain_diffusers(folders, tmp_path, monkeypatch, kind, dora):
    model, pipeline = learned(folders(kind), dora)
    ours = drawn(pipeline)
    keep(adapter_of_parts(model, {"modelspec.trigger_phrase": "zwx"}), tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    theirs = plain(folders(kind))
    before = drawn(theirs)
    theirs.load_lora_weights("adapter")  # which finds the file in it, without a network
    assert far(ours, before) > MOVED
    assert far(ours, drawn(theirs)) < SAME


def test_merged_into_the_priors_folder_for_good(folders, tmp_path):
    base, merged = folders("wuerstchen-prior"), tmp_path / "wuerstchen-prior"
    model, pipeline = learned(base)
    merge_pipeline(base, [(adapter_of_parts(model, {}), 1.0)], merged)
    assert far(drawn(pipeline), drawn(plain(merged))) < SAME


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {f"{path}.{name}": own for path, every in adapter.tensors.items() for name, own in every.items()}


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "wuerstchen-prior"])
def test_to_kohyas_format_and_back(folders, tmp_path, kind):
    whole = ["to_q", "to_k", "to_v", "to_out.0", "mapper", "cond_mapper.0", "projection"]
    model, pipeline = learned(folders(kind), target_modules=whole if kind == "wuerstchen-prior" else "kohya")
    held = adapter_of_parts(model, {"modelspec.trigger_phrase": "zwx"})
    keep(held, tmp_path / "adapter")
    one = files.read(tmp_path / "adapter")
    files.write(one, tmp_path / "own.safetensors", "kohya")
    back = files.read(tmp_path / "own.safetensors")
    assert files.detect(tmp_path / "own.safetensors") == "kohya"
    assert back.metadata["modelspec.trigger_phrase"] == "zwx"
    files.write(back, tmp_path / "again" / "pytorch_lora_weights.safetensors", "diffusers")
    again = files.read(tmp_path / "again")
    assert tensors(one).keys() == tensors(again).keys()
    assert all(torch.equal(own, tensors(again)[name]) for name, own in tensors(one).items())
    if not hasattr(pipeline, "prior"):  # which diffusers reads in its own format alone
        theirs = plain(folders(kind))
        theirs.load_lora_weights(tmp_path / "own.safetensors")
        assert far(drawn(pipeline), drawn(theirs)) < SAME
