"""(IA)³: which layers are rescaled by rows and which by columns, and what is said of a wrong name."""

import pytest
import torch

from veneer import AdapterError, LoraConfig, get_peft_model

TARGETS = ["k_proj", "v_proj", "down_proj"]


def config(**options: object) -> LoraConfig:
    return LoraConfig(peft_type="IA3", target_modules=TARGETS, options=options)


@pytest.mark.parametrize("named", [["down_proj"], r".*\.mlp\.down_proj"], ids=str)
def test_outputs_are_scaled_and_inputs_where_named(tiny, named):
    model = get_peft_model(tiny("llama"), config(feedforward_modules=named))
    layer = model.model.layers[0]
    sizes = {
        name: tuple(layer.get_submodule(name).adapters["default"].l.shape)
        for name in ("self_attn.k_proj", "mlp.down_proj")
    }
    assert sizes == {"self_attn.k_proj": (16, 1), "mlp.down_proj": (1, 48)}
    assert model.get_nb_trainable_parameters()[0] == 2 * (16 + 16 + 48)


def test_a_name_among_none_of_the_adapted_layers_is_refused(tiny, bits):
    base = tiny("llama")
    before = bits(base)
    for named, said in (
        (["down_proj", "dwn_proj"], "'dwn_proj' matches no module; did you mean 'down_proj'"),
        (["up_proj"], "feedforward_modules among the adapted layers: 'up_proj' matches no module"),
        (".*up_proj", "feedforward_modules among the adapted layers: '.*up_proj' is a regular expression"),
    ):
        with pytest.raises(AdapterError) as error:
            get_peft_model(base, config(feedforward_modules=named))
        assert said in str(error.value)
    for wrong in (3, "", [3], None, True):
        with pytest.raises(AdapterError, match="feedforward_modules should be names of layers"):
            config(feedforward_modules=wrong)
    assert bits(base) == before


def test_layer_numbers_are_spelled_out_for_peft_which_knows_none_here(tiny):
    named = LoraConfig(peft_type="IA3", target_modules=TARGETS, layers_to_transform=[1])
    model = get_peft_model(tiny("llama"), named)
    wanted = [f"model.layers.1.{name}" for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")]
    assert model.peft_config["default"].target_modules == wanted


@pytest.mark.parametrize("columns", [False, True])
def test_a_linear_layer_never_builds_the_change(columns, monkeypatch):
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(6, 5)),
        LoraConfig(peft_type="IA3", target_modules=["0"], options={"feedforward_modules": ["0"] if columns else []}),
    )
    update, x = model[0].adapters["default"], torch.randn(3, 6)
    torch.nn.init.normal_(update.l)
    scaled = update.l.flatten()
    wanted = model[0].weight @ (x * scaled).T if columns else model[0].weight @ x.T * scaled[:, None]
    wanted = wanted.T + model[0].bias * (1 if columns else scaled)
    monkeypatch.delattr(type(update), "delta")
    torch.testing.assert_close(model(x), wanted)
