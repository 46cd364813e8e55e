"""A Llama in a GGUF file → a folder that transformers loads, with dense bfloat16 weights.

transformers can read GGUF too, but how differs from release to release (packed or dense by default), it reads
the file three times, and it drops the rule that digits stand alone. Here it is read once, and the folder is
the same whatever is installed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from veneer.core.errors import AdapterError, listed
from veneer.zoo.needed import needed

CONTROL = 3  # GGUF's kind of token that text never contains
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and chat template of the Llama in `source` into `folder`."""
    reader = needed("gguf").GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise AdapterError(f"{source.name} holds a {fields.get('general.architecture')!r}, expected a 'llama'")
    config = _config(fields, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    _write_json(folder / "config.json", config)
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", tokens)
    _write_tokenizer(fields, config, folder)
    _write_weights(reader.tensors, config, folder)


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """The model's config.json, from the metadata of the file."""
    llama = {name.removeprefix("llama."): value for name, value in fields.items()}
    heads, width = llama["attention.head_count"], llama["embedding_length"]
    special = {
        f"{short}_token_id": fields.get(f"tokenizer.ggml.{long}_token_id")
        for short, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    theta = float(llama.get("rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": llama.get("attention.head_count_kv", heads),
        "head_dim": llama.get("rope.dimension_count", width // heads),
        "hidden_act": "silu",
        "max_position_embeddings": llama["context_length"],
        # stored as float32: seven digits are all it says
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": theta,  # where transformers before 5 looks; it would take 10000 without a word
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "use_cache": True,
        **special,
    }


def _write_weights(tensors: list[Any], config: dict[str, Any], folder: Path) -> None:
    """Write model.safetensors: every tensor made dense in float32, then rounded once to bfloat16."""
    torch, numpy, safetensors = needed("torch"), needed("numpy"), needed("safetensors.torch")
    dequantize = needed("gguf.quants").dequantize
    unknown = [tensor.name for tensor in tensors if _path(tensor.name) is None]
    if unknown:
        raise AdapterError(f"the GGUF file has tensors that a Llama does not have: {listed(unknown)}")
    weights = {}
    for tensor in tensors:
        dense = dequantize(tensor.data, tensor.tensor_type)  # what was float32 already is a view of the file
        weight = torch.from_numpy(numpy.require(dense, requirements="W"))  # (out, in) or (width,)
        if ".attn_q." in tensor.name:
            weight = _halves(weight, config["num_attention_heads"])
        elif ".attn_k." in tensor.name:
            weight = _halves(weight, config["num_key_value_heads"])
        weights[_path(tensor.name)] = weight.to(torch.bfloat16)
    target = folder / "model.safetensors"
    safetensors.save_file(weights, target, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", target)  # safetensors makes files that only their owner reads


def _path(name: str) -> str | None:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; None for what a Llama has not."""
    match name.split("."):
        case [part, "weight"] if part in _OUTER:
            return f"{_OUTER[part]}.weight"
        case ["blk", layer, part, "weight"] if part in _INNER:
            return f"model.layers.{layer}.{_INNER[part]}.weight"
    return None


def _halves(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's order of a head's rows: it turns neighbours (2i, 2i+1), transformers the two halves."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])  # (heads, head width / 2, 2, in)
    return pairs.transpose(1, 2).reshape(weight.shape)  # (out, in)


def _write_tokenizer(fields: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template: byte-level BPE, digits one by one."""
    library = needed("tokenizers")
    flavour = (fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre"))
    if flavour != ("gpt2", "smollm"):
        raise AdapterError(f"the GGUF file has a tokenizer of kind {flavour}, expected ('gpt2', 'smollm')")
    words = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    model = library.models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges)
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Digits(individual_digits=True),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = library.decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([library.AddedToken(word, normalized=False) for word in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {key.removesuffix("_id"): words[config[key]] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    unknown = words[fields["tokenizer.ggml.unknown_token_id"]]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "unk_token": unknown}
    settings |= {"model_max_length": config["max_position_embeddings"], "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON file the way transformers writes it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
