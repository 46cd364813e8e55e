"""Mixed rows: a batch whose rows have adapters of their own is as each row run alone with its adapter."""

import pytest
import torch

from veneer import AdapterError, LoraConfig, get_peft_model

ROWS = ["a", "__base__", {"a": 0.7, "b": -0.3}, "b", "a"]


@pytest.fixture
def mixed(case):
    """The cases that can be mixed: attention, whose inputs may have the rows anywhere, says no."""
    if case.kind.__name__ == "AdaptedAttention":
        model = case.adapted("a")
        with pytest.raises(AdapterError, match="cannot be mixed by rows"):
            model(case.x(2), adapter_names=["a", "a"])
        pytest.skip("refused")
    return case


def alone(model, x, rows, **inputs):
    """Each row on its own."""
    outputs = []
    for i, row in enumerate(rows):
        with model.using([] if row == "__base__" else row):
            outputs.append(model(x[i : i + 1]))
    return torch.cat(outputs)


def test_mixed_rows_are_rows_alone(mixed):
    model, x = mixed.adapted("a", "b"), mixed.x(5)
    y = model(x, adapter_names=ROWS)
    torch.testing.assert_close(y, alone(model, x, ROWS))
    with model.disable_adapter():
        base = model(x)
    for i, row in enumerate(ROWS):
        if row == "__base__":
            assert torch.equal(y[i], base[i])
    assert model.active_adapters == ["a"]


def test_the_gradients_are_those_of_the_rows_alone(mixed):
    case = mixed
    model, x = case.adapted("a", "b", base=case.stack(), targets=["layer", "head"]), case.x(5)
    mixed = torch.autograd.grad(model(x, adapter_names=ROWS).square().sum(), case.parameters(model))
    separate = torch.autograd.grad(alone(model, x, ROWS).square().sum(), case.parameters(model))
    torch.testing.assert_close(mixed, separate)


def test_an_error_leaves_nothing_behind(mixed):
    case = mixed
    model = case.adapted("a", "b")
    for rows, said in (
        (["a", "c"], "no adapter named 'c'"),
        ("a", "a list with an entry for each row"),
        ([], "a list"),
    ):
        with pytest.raises(AdapterError, match=said):
            model(case.x(2), adapter_names=rows)
    for rows in (3, 4, 1):  # a multiple is no better: rows would change their adapter half-way
        with pytest.raises(
            AdapterError, match=f"adapter_names has 2 entries, the input of an adapted layer {rows} rows"
        ):
            model(case.x(rows), adapter_names=["a", "b"])
    assert model.active_adapters == ["a"]
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        model(case.x(2), adapter_names=["a", "b"])


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_each_row_its_adapter(tiny, beams):
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=64, init_lora_weights=False))
    ids = torch.randint(3, 64, (4, 5))
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    rows = ["b", "__base__", "a", {"a": 2.0, "b": 0.5}]
    together = model.generate(ids, adapter_names=rows, **options)
    for i, row in enumerate(rows):
        with model.using([] if row == "__base__" else row):
            single = model.generate(ids[i : i + 1], **{**options, "attention_mask": torch.ones(1, 5)})[0]
        assert torch.equal(together[i, : len(single)], single)


def test_recomputation_is_refused(tiny):
    model = get_peft_model(tiny("llama"), LoraConfig(), "a").train()
    newer = "activation_checkpointing_enable"
    getattr(model, newer if hasattr(model, newer) else "gradient_checkpointing_enable")()
    with pytest.raises(AdapterError, match="gradient checkpointing"):
        model(torch.tensor([[3, 4]]), adapter_names=["a"])
