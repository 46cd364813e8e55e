"""PEFT's folders for one model: ΔW = α / r · B A, or α / √r, with exceptions by pattern, and what is trained whole."""

import math
from functools import partial

import peft
from torch import Tensor, nn

from peers import known
from peers.cases import Builders, Case
from peers.pipelines import layers

_BLOCK = {"unet": "up_blocks.1", "text_encoder": "encoder.layers.1"}  # has an α of its own


def _case(part: str, targets: list[str], **config: object) -> Case:
    return Case("sd1", "peft", part=part, config=said_by_peft(target_modules=targets, **config))


def said_by_peft(**config: object) -> dict[str, object]:
    """All that PEFT writes about it."""
    said = peft.LoraConfig(**config).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in said.items()}


def _key(path: str, ending: str) -> str:
    return f"base_model.model.{path}.{ending}"


def _layers(part: str, *endings: str) -> dict[str, nn.Module]:
    """The layers of one model, by their paths in it, that end so."""
    own = {name.removeprefix(f"{part}."): layer for name, layer in layers("sd1").items() if name.startswith(f"{part}.")}
    return {path: layer for path, layer in own.items() if path.endswith(endings)}


def lora(part: str, *endings: str, magnitude: str = "", bias: bool = False, **config: object) -> Case:
    """LoRA with a rank and an α of its own for some; `magnitude` is what the file calls DoRA's."""
    named = {"lora_bias": bias, "use_dora": bool(magnitude), **config}
    patterns = {
        "rank_pattern": {endings[0]: 3},
        "alpha_pattern": {f".*\\.{endings[-1]}": 5.0, f"{_BLOCK[part]}.*": 1.0},
    }
    built = _case(part, list(endings), r=2, lora_alpha=4.0, **patterns, **named)
    for i, (path, layer) in enumerate(_layers(part, *endings).items()):
        r = 3 if path.endswith(endings[0]) else 2
        last = path.endswith(f".{endings[-1]}")
        alpha = 5.0 if last else 1.0 if path.startswith(_BLOCK[part]) else 4.0
        scale = alpha / (math.sqrt(r) if named.get("use_rslora") else r)
        draw = known.normal(i)
        B, A = known.pair(layer, r, draw)
        built.tensors |= {_key(path, "lora_A.weight"): A, _key(path, "lora_B.weight"): B}
        delta = known.lora(layer, B, A, scale)
        if magnitude:
            m = 1 + draw(layer.weight.shape[0]).abs()
            built.tensors[_key(path, magnitude)] = m.view(1, -1, 1, 1) if delta.dim() == 4 else m
            delta = known.dora(layer, delta, m)
        if bias:
            built.tensors[_key(path, "lora_B.bias")] = draw(layer.weight.shape[0])
            built.wanted[f"{part}.{path}.bias"] = scale * built.tensors[_key(path, "lora_B.bias")].double()
        built.wanted[f"{part}.{path}.weight"] = delta
    return built


def embedding() -> Case:
    """A table (words, width): ΔW = α / r · (B A)ᵀ, A (r, words), B (width, r)."""
    part, path = "text_encoder", "embeddings.token_embedding"
    table = layers("sd1", (nn.Embedding,))[f"{part}.{path}"]
    built = _case(part, ["token_embedding"], r=3, lora_alpha=2.0)
    draw = known.normal(0)
    A, B = draw(3, table.num_embeddings), draw(table.embedding_dim, 3)
    built.tensors = {_key(path, "lora_embedding_A"): A, _key(path, "lora_embedding_B"): B}
    built.wanted = {f"{part}.{path}.weight": 2 / 3 * (B.double() @ A.double()).T}
    return built


def saved_whole() -> Case:
    """`modules_to_save` takes the place of the base's."""
    built = lora("unet", "to_q", "to_v")
    built.config["modules_to_save"] = ["conv_out", "time_embedding.linear_2"]
    for i, (path, layer) in enumerate(_layers("unet", "conv_out", "time_embedding.linear_2").items()):
        _replace(built, path, "weight", layer.weight, known.normal(500 + i))
        _replace(built, path, "bias", layer.bias, known.normal(600 + i))
    return built


def biases(which: str) -> Case:
    """`bias`: those of the adapted layers, or all that the model has, as they are after training."""
    built = lora("unet", "ff.net.2", "time_emb_proj")
    built.config["bias"] = which
    adapted = _layers("unet", "ff.net.2", "time_emb_proj")
    for i, (path, layer) in enumerate(layers("sd1", (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)).items()):
        path = path.removeprefix("unet.")
        if path.startswith("text_encoder.") or layer.bias is None or (which == "lora_only" and path not in adapted):
            continue
        name = "base_layer.bias" if path in adapted else "bias"
        _replace(built, path, name, layer.bias, known.normal(700 + i))
    return built


def _replace(built: Case, path: str, name: str, old: Tensor, draw: known.Draw) -> None:
    """The file holds the value itself."""
    value = built.tensors[_key(path, name)] = draw(*old.shape)
    built.wanted[f"{built.part}.{path}.{name.removeprefix('base_layer.')}"] = value.double() - old.double()


_TEXT = "text_encoder", "q_proj", "fc1", "out_proj"
_UNET = "unet", "to_k", "to_out.0", "conv1", "conv_shortcut", "proj_in"
CASES: Builders = {
    "peft: linear layers": partial(lora, *_TEXT),
    "peft: convolutions": partial(lora, *_UNET),
    "peft: rsLoRA": partial(lora, *_UNET, use_rslora=True),
    "peft: DoRA": partial(lora, *_UNET, magnitude="lora_magnitude_vector"),
    "peft: DoRA, the other name": partial(lora, *_TEXT, magnitude="lora_magnitude_vector.weight"),
    "peft: biases of B": partial(lora, *_TEXT, bias=True),
    "peft: an embedding": embedding,
    "peft: modules_to_save": saved_whole,
    "peft: biases of adapted layers": partial(biases, "lora_only"),
    "peft: all biases": partial(biases, "all"),
}
