"""The law of packing: in a packed row, each document gives what it gives alone, and gets the same gradient."""

from itertools import combinations, pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from veneer import LoraConfig, get_peft_model
from veneer.train.language import attention, packing
from veneer.train.language.packing import find_packing, level_passes, packed, padded, passes

LENGTHS = (9, 1, 17, 5, 9, 30, 2)
PACKED = ["llama", "mistral", "qwen3", "gpt2", "gpt_neox", "opt", "bert", "roberta", "distilbert"]
SMALL = {"mistral": {"sliding_window": 4}, "bert": {"is_decoder": False}}


@pytest.fixture
def model(request, tiny):
    family = request.param
    base = tiny(family, **SMALL.get(family, {}))
    if hasattr(base, "classifier"):
        base = AutoModelForMaskedLM.from_config(base.config).eval()
    return base.double()


def rows(model, lengths=LENGTHS):
    return [torch.randint(3, 64, (length,)).tolist() for length in lengths]


def outputs(model, inputs):
    return model(**inputs)[0][0]


def adapted(model):
    model.first = find_packing(model)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("model", PACKED, indirect=True)
@pytest.mark.parametrize("short", [0, 12, 192])
def test_each_document_gives_what_it_gives_alone(model, short, monkeypatch):
    """By torch's kernel, by batched products, and by both."""
    monkeypatch.setattr(attention, "SHORT", short)
    model = adapted(model)
    documents = rows(model)
    together = outputs(model, packed(documents, model.first))
    alone = torch.cat([outputs(model, padded([row], 0)) for row in documents])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    direction, trained = torch.randn_like(alone), [own for own in model.parameters() if own.requires_grad]
    found, wanted = (torch.autograd.grad((out * direction).sum(), trained) for out in (together, alone))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("model", PACKED, indirect=True)
def test_what_one_document_says_changes_no_other_by_a_bit(model):
    model = adapted(model)
    before = rows(model)
    after = [row if i != 2 else [1 + token % 60 for token in row] for i, row in enumerate(before)]
    found = [outputs(model, packed(documents, model.first)).split(LENGTHS) for documents in (before, after)]
    for i, (one, other) in enumerate(zip(*found, strict=True)):
        assert torch.equal(one, other) == (i != 2)


@pytest.mark.parametrize("model", ["llama", "gpt2"], indirect=True)
def test_gradient_checkpointing_sees_the_same_documents(model):
    model = adapted(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs, trained = packed(rows(model), model.first), [own for own in model.parameters() if own.requires_grad]
    wanted = torch.autograd.grad(outputs(model, inputs).square().sum(), trained)
    newer = "activation_checkpointing_enable"
    enable = getattr(model, newer if hasattr(model, newer) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})
    found = torch.autograd.grad(outputs(model, inputs).square().sum(), trained)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("model", ["llama", "gpt2", "roberta"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_packed_give_what_they_gave(model, dtype):
    model = model.to(dtype)
    inputs = padded(rows(model), 0)
    before = model(**inputs)[0]
    assert find_packing(model) is not None
    assert model.config._attn_implementation == attention.NAME
    assert torch.equal(model(**inputs)[0], before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_without_a_padding_token_is_packed(tiny, family):
    assert find_packing(tiny(family, pad_token_id=None)) == 0


def test_a_window_that_no_layer_has_is_none():
    """Qwen2-MoE makes a mask for it all the same."""
    model = decoder("qwen2_moe", use_sliding_window=False)
    assert find_packing(model) == 0


def test_generating_is_as_before(tiny):
    model, prompt = tiny("llama"), torch.randint(3, 64, (2, 5))
    before = model.generate(prompt, max_new_tokens=8, do_sample=False)
    find_packing(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), before)


@pytest.mark.parametrize("family", ["bloom", "t5", "deberta-v2", "vit"])
def test_what_cannot_be_packed_is_found_and_left_as_it_was(tiny, family):
    model = tiny(family)
    before = model.config._attn_implementation
    assert find_packing(model) is None
    assert model.config._attn_implementation == before


def test_a_model_without_a_padding_token_can_be_packed(tiny):
    assert find_packing(tiny("llama", pad_token_id=None, vocab_size=9, bos_token_id=None, eos_token_id=None)) == 0


def decoder(family, **settings):
    """A family that `tiny` does not know."""
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    config = AutoConfig.for_model(family, **{**tokens, **heads, **sizes, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama4_text", {"attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 48}),
        ("phimoe", {"sliding_window": 16, "num_local_experts": 2}),
        ("qwen2_moe", {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}),
    ],
)
def test_a_window_that_only_masks_know_is_not_packed_however_long_it_is(family, settings):
    """The trial's documents fit into it; those of the data may not."""
    model = decoder(family, **settings)
    assert find_packing(model) is None
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    ],
)
def test_a_leak_that_is_smaller_than_rounding_is_found(family, settings, dtype):
    """A convolution over the border, with weights that hardly matter yet."""
    assert find_packing(decoder(family, **settings).to(dtype)) is None


@pytest.mark.parametrize("where", ["attention", "positions"])
def test_a_leak_is_found(tiny, where, monkeypatch):
    if where == "attention":
        monkeypatch.setattr(packing, "documents", lambda lengths: attention.documents([sum(lengths)]))
    else:
        right = packing.packed
        monkeypatch.setattr(packing, "packed", lambda rows, first: right([[*rows[0], *rows[1]]], first))
    assert find_packing(tiny("llama")) is None


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("most", [1, 16, 40, 1000])
def test_passes_hold_every_row_once_and_no_more_than_they_may(most, pads):
    lengths = torch.randint(1, 30, (50,)).tolist()
    found = passes(lengths, most, pads)
    assert sorted(i for own in found for i in own) == list(range(50))
    for own in found:
        longest = max(lengths[i] for i in own)
        assert len(own) == 1 or (len(own) * longest if pads else sum(lengths[i] for i in own)) <= most
    if most == 1000 and not pads:
        assert len(found) == 1


def test_equal_rows_are_shared_out_evenly():
    assert sorted(len(own) for own in passes([10] * 16, 60, pads=False)) == [5, 5, 6]


@pytest.mark.parametrize(("most", "extra"), [(10**6, 8), (60, 8), (31, 0), (10**6, 10**6), (3, 5)])
def test_level_passes_have_the_fewest_tokens(most, extra):
    def cost(borders):
        own = [ordered[a:b] for a, b in pairwise((0, *borders, len(ordered)))]
        fits = all(len(rows) == 1 or len(rows) * max(rows) <= most for rows in own)
        return sum(len(rows) * max(rows) + extra for rows in own) if fits else float("inf")

    ordered = sorted(LENGTHS)
    inside = range(1, len(ordered))
    least = min(cost(borders) for count in range(len(ordered)) for borders in combinations(inside, count))
    found = level_passes(LENGTHS, most, extra)
    assert sorted(i for own in found for i in own) == list(range(len(LENGTHS)))
    assert all(len(own) == 1 or len(own) * max(LENGTHS[i] for i in own) <= most for own in found)
    assert sum(len(own) * max(LENGTHS[i] for i in own) + extra for own in found) == least
    assert (len(found) == 1) == (extra == 10**6)
