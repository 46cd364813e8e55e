"""The same file through a peer and through veneer: what each changes in the weights."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import veneer
import veneer.files
from peers.cases import Case
from peers.old_files import ENABLED
from peers.pipelines import Deltas, deltas, fresh, parts, values


def _changed(case: Case, load: Callable[[object, dict[str, nn.Module]], object]) -> Deltas:
    """What `load(pipeline, models)` changes."""
    pipeline = fresh(case.family)
    models = parts(pipeline)
    before = values(models)
    load(pipeline, models)
    return deltas(values(parts(pipeline)), before)


def through_veneer(case: Case, path: Path) -> Deltas:
    adapter = veneer.files.read(path, **case.asked)

    def load(pipeline: object, models: dict[str, nn.Module]) -> None:
        target = models[case.part] if case.part else pipeline
        carriers = veneer.files.attach(target, adapter)
        for carrier in [carriers] if isinstance(carriers, nn.Module) else carriers.values():
            carrier.merge_and_unload()

    return _changed(case, load)


def through_diffusers(case: Case, path: Path) -> Deltas:
    def load(pipeline: object, models: dict[str, nn.Module]) -> None:
        if pipeline is models:  # without a pipeline around them
            for part, model in models.items():
                model.load_lora_adapter(path.parent, weight_name=path.name, prefix=part)
                model.fuse_lora()
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following alpha_pattern keys did not match", RuntimeWarning)
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
        pipeline.fuse_lora()

    return _changed(case, load)


def through_lycoris(case: Case, path: Path) -> Deltas:
    from lycoris import LycorisNetwork, create_lycoris_from_weights

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if case.family == "sdxl" else "lora_te"}

    def load(pipeline: object, models: dict[str, nn.Module]) -> None:
        usual = LycorisNetwork.LORA_PREFIX
        try:
            for part, model in models.items():
                LycorisNetwork.LORA_PREFIX = prefixes.get(part, "lora_te2")
                # files call a text encoder's layers so; transformers 5 does for one of its two classes
                named = nn.ModuleDict({"text_model": model}) if part == "text_encoder" else model
                create_lycoris_from_weights(1.0, str(path), named)[0].merge_to(1.0)
        finally:
            LycorisNetwork.LORA_PREFIX = usual

    return _changed(case, load)


def through_peft(case: Case, path: Path) -> Deltas:
    import peft

    def load(pipeline: object, models: dict[str, nn.Module]) -> None:
        adapted = peft.PeftModel.from_pretrained(models[case.part], path)
        setattr(pipeline, case.part, adapted.merge_and_unload())

    return _changed(case, load)


def through_loralib(case: Case, path: Path) -> Deltas:
    """Its own layers in the same places with the same weights; they merge when they leave training."""
    import loralib

    def theirs(name: str, layer: nn.Module) -> nn.Module:
        A, B = case.tensors[f"{name}.lora_A"], case.tensors[f"{name}.lora_B"]
        said = {"lora_alpha": case.asked["alpha"], "r": B.shape[1]}
        if name in ENABLED:
            sizes = layer.in_features, layer.out_features
            return loralib.MergedLinear(*sizes, enable_lora=ENABLED[name], bias=layer.bias is not None, **said)
        if isinstance(layer, nn.Linear):
            return loralib.Linear(layer.in_features, layer.out_features, **said)
        if isinstance(layer, nn.Embedding):
            return loralib.Embedding(layer.num_embeddings, layer.embedding_dim, **said)
        k = layer.kernel_size[0]
        return loralib.Conv2d(layer.in_channels, layer.out_channels, k, **{**said, "r": A.shape[0] // k})

    def load(model: nn.Module, _: object) -> None:
        for name, layer in list(model.named_children()):
            own = theirs(name, layer)
            (own.conv if isinstance(layer, nn.Conv2d) else own).load_state_dict(layer.state_dict(), strict=False)
            setattr(model, name, own)
        missing = model.load_state_dict(torch.load(path, weights_only=True), strict=False)
        assert not missing.unexpected_keys
        model.train()
        model.eval()
        for name in ("point", "wide"):
            setattr(model, name, getattr(model, name).conv)

    return _changed(case, load)


PEERS = {"loralib": through_loralib, "peft": through_peft, "diffusers": through_diffusers, "lycoris": through_lycoris}
