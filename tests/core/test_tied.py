"""Rows of a table by themselves, and weights that an embedding and a head share."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from veneer import AdapterError, LoraConfig, PeftModel, get_peft_model
from veneer.core.inject import adapted_layers

TOKENS = torch.tensor([[3, 9, 4, 9], [5, 6, 7, 8], [9, 5, 3, 1]])
IDS = [9, 3, 40]
ROWS = {"target_modules": ["q_proj"], "trainable_token_indices": IDS}


def moved(model: nn.Module) -> nn.Module:
    """Trained: no longer what it was."""
    for parameter in {p for _, layer in adapted_layers(model) for p in layer.adapters.parameters()}:
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=[True, False], ids=["tied", "apart"])
def base(request, tiny) -> nn.Module:
    return tiny("llama", tie_word_embeddings=request.param).double()


def with_rows(base: nn.Module, rows: Tensor) -> nn.Module:
    """The definition: the base with other rows in its table, and in its head where they are one."""
    model = copy.deepcopy(base)
    model.get_input_embeddings().weight.data[IDS] = rows
    return model


def test_fresh_rows_change_nothing_and_trained_ones_stand_in_the_table(base):
    plain, before = copy.deepcopy(base), base(TOKENS).logits
    model = get_peft_model(base, LoraConfig(target_modules=[], trainable_token_indices=IDS))
    assert torch.equal(model(TOKENS).logits, before)
    (rows,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    assert rows.shape == (3, 32)
    moved(model)
    exact = with_rows(plain, rows.detach())
    live = model(TOKENS).logits
    torch.testing.assert_close(live, exact(TOKENS).logits, rtol=1e-12, atol=1e-12)
    table = exact.get_input_embeddings().weight.requires_grad_()
    (exact(TOKENS).logits.square().sum()).backward()
    live.square().sum().backward()
    torch.testing.assert_close(rows.grad, table.grad[IDS], rtol=1e-10, atol=1e-10)
    assert table.grad[IDS].any()


@pytest.mark.parametrize("cast", [False, True], ids=["own precision", "cast with the model"])
def test_rows_of_a_table_of_low_precision_are_rounded_once(tiny, cast):
    model = get_peft_model(tiny("llama", tie_word_embeddings=True).bfloat16(), LoraConfig(**ROWS))
    table = model.get_input_embeddings()
    rows = table.adapters["default"].rows
    rows.data.normal_(std=1e-4)  # beside which those of the base are large
    model = model.bfloat16() if cast else model
    exact = table.adapters["default"].rows.bfloat16()
    torch.testing.assert_close(table(torch.tensor(IDS)), exact, rtol=2**-7, atol=0)
    others = torch.tensor([0, 1, 2, 5])
    assert torch.equal(table(others), table.weight[others])


def test_merged_rows_are_the_table_to_the_bit_and_back(base, bits):
    exact = copy.deepcopy(base)
    model = moved(get_peft_model(base, LoraConfig(**ROWS)))
    before, live = bits(model), model(TOKENS).logits
    rows = model.get_input_embeddings().adapters["default"].rows
    model.merge_adapter()
    assert torch.equal(
        model.get_input_embeddings().weight, with_rows(exact, rows.detach()).get_input_embeddings().weight
    )
    torch.testing.assert_close(model(TOKENS).logits, live, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    assert bits(model) == before
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    merged = model.merge_and_unload()
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied
    torch.testing.assert_close(merged(TOKENS).logits, live, rtol=1e-12, atol=1e-12)


def test_no_table_is_built(tiny):
    model = get_peft_model(tiny("llama", vocab_size=5000, tie_word_embeddings=True), LoraConfig(**ROWS)).train()
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
            sizes.extend(t.numel() for t in made if t.data_ptr() != model.lm_head.weight.data_ptr())
            return out

    with Sizes():
        model(TOKENS).logits.sum().backward()
    assert sizes
    assert max(sizes) < 5000 * 32


def test_one_parameter_stays_one(base, tmp_path):
    model = moved(get_peft_model(base, LoraConfig(**ROWS)))
    trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trains == 3 * 32 + 2 * 8 * (32 + 32)
    live = model(TOKENS).logits
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(TOKENS).logits, live, rtol=0, atol=0)
    twin.get_input_embeddings().adapters["default"].rows.data.zero_()
    assert torch.equal(model(TOKENS).logits, live)
    assert not torch.equal(twin(TOKENS).logits, live)
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(read(TOKENS).logits, live)


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_of_a_batch_have_their_own_tokens(base, beams, expect_rows_as_alone):
    model = get_peft_model(base, LoraConfig(**ROWS), "a")
    model.add_adapter("b", LoraConfig(target_modules=["v_proj"], trainable_token_indices=[9, 7]))
    moved(model)
    together = expect_rows_as_alone(model, TOKENS, ["b", "__base__", {"a": 0.5, "b": -2.0}], beams, new=5)
    with model.disable_adapter():
        assert torch.equal(together[1], model(TOKENS).logits[1])
    model.delete_adapter("a")
    assert "a" not in model.lm_head.adapters if hasattr(model.lm_head, "adapters") else True


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trainable_token_indices": [64, 3]}, "embed_tokens is a Embedding with 64 rows, and no 64"),
        (
            {"trainable_token_indices": {"embed_token": [3]}},
            "'embed_token' matches no module.*did you mean 'embed_tokens",
        ),
        ({"trainable_token_indices": {"q_proj": [3]}}, "q_proj is a Linear which is no table"),
        ({**ROWS, "target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding that is changed in two ways"),
        ({**ROWS, "modules_to_save": ["embed_tokens"]}, "embed_tokens is a Embedding that is changed in two ways"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_trained_are_refused_by_name(tiny, settings, said):
    with pytest.raises(AdapterError, match=f"(?s){said}"):
        get_peft_model(tiny("llama"), LoraConfig(**{"target_modules": ["q_proj"], **settings}))


@pytest.mark.parametrize("ids", [[3, 3], [-1], [1.5], [True], [], {"embed_tokens": "x"}, 3], ids=str)
def test_ids_that_are_none_are_refused(ids):
    with pytest.raises(AdapterError, match="trainable_token_indices should be token ids, each once"):
        LoraConfig(trainable_token_indices=ids)


ALONE = [
    {"target_modules": ["lm_head"], "init_lora_weights": False},
    {"target_modules": ["embed_tokens"], "init_lora_weights": False},
    {"target_modules": [], "modules_to_save": ["lm_head"]},
    {"target_modules": [], "modules_to_save": ["embed_tokens"]},
    {"target_modules": [], "modules_to_save": ["lm_head", "embed_tokens"]},
]


@pytest.mark.parametrize("settings", ALONE, ids=str)
@pytest.mark.filterwarnings("ignore:.*are one weight, and only")
def test_a_weight_that_is_changed_in_one_layer_is_merged_where_it_is_untied(tiny, bits, settings, tmp_path):
    model = moved(get_peft_model(tiny("llama", tie_word_embeddings=True), LoraConfig(**settings)))
    before, live = bits(model), model(TOKENS).logits
    with pytest.raises(AdapterError, match=r"other layers share: .*merge_and_unload\(untie=True\)"):
        model.merge_and_unload()
    assert bits(model) == before
    assert model.lm_head.weight is model.get_input_embeddings().weight
    merged = model.merge_and_unload(untie=True)
    assert merged.lm_head.weight is not merged.get_input_embeddings().weight
    torch.testing.assert_close(merged(TOKENS).logits, live)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(type(merged).from_pretrained(tmp_path)(TOKENS).logits, live)


@pytest.mark.parametrize("settings", ALONE[:4], ids=str)
def test_a_weight_that_is_kept_tied_is_changed_in_both(tiny, settings):
    with pytest.warns(UserWarning, match=r"embed_tokens\.weight and lm_head\.weight are one weight, and only"):
        get_peft_model(tiny("llama", tie_word_embeddings=True), LoraConfig(**settings))
    model = tiny("llama", tie_word_embeddings=True).double()
    model = moved(get_peft_model(model, LoraConfig(ensure_weight_tying=True, **settings)))
    live = model(TOKENS).logits
    live.sum().backward()
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(merged(TOKENS).logits, live, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_kept_tied_is_refused(tiny):
    tied = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    for settings in ({"use_dora": True}, {"peft_type": "LOHA"}, {"target_modules": [], "modules_to_save": ["model"]}):
        with pytest.raises(AdapterError, match="are one weight: what changes both is LoRA without DoRA"):
            get_peft_model(tiny("llama", tie_word_embeddings=True), LoraConfig(**{**tied, **settings}))
