"""Mix: a blend is the sum of its parts; what acts for a while is put back, whatever happens; gradients stay as set."""

import pytest
import torch

from veneer import AdapterError


@pytest.mark.parametrize("blend", [["a", "b"], {"a": 0.7, "b": -1.3}, {"a": 1, "b": 2, "c": 3}], ids=str)
def test_a_blend_is_the_sum(case, blend):
    model, x = case.adapted("a", "b", "c"), case.x(3)
    if len(case.kind.matrices(model.layer)) > 1:
        pytest.skip("matrices that meet each other: their changes are summed, the outputs are not (law of delta)")
    with model.disable_adapter():
        base = total = model(x)
    for name, weight in (blend if isinstance(blend, dict) else dict.fromkeys(blend, 1.0)).items():
        with model.using(name):
            total = total + weight * (model(x) - base)
    model.set_adapter(blend)
    torch.testing.assert_close(model(x), total, rtol=1e-11, atol=1e-11)


def test_loading_another_adapter_changes_nothing_about_the_first(case):
    model, x = case.adapted("a"), case.x(3)
    before = model(x)
    model.add_adapter("b", case.config(init_lora_weights=False, lora_dropout=0.5))
    assert torch.equal(model(x), before)
    model.delete_adapter("b")
    assert torch.equal(model(x), before)


def test_using_nothing_is_the_base_to_the_bit(case):
    base, x = case.base().requires_grad_(False), case.x(3)  # attention has another path where nothing learns
    before = base(x)
    model = case.adapted(base=base)
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), before)
        assert not torch.equal(model(x), before)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("inside", ["b", [], {"a": 0.5, "b": 0.5}], ids=str)
def test_using_restores_what_acted_also_after_an_error(case, bits, inside, merged):
    model, x = case.adapted("a", "b"), case.x(3)
    model.set_adapter({"a": 0.7})
    if merged:
        model.merge_adapter()
    before, y, plan = bits(model), model(x), vars(model.adapter_plan).copy()

    def fail_inside() -> None:
        with model.using(inside):
            assert model.active_adapters == list(inside)
            with model.disable_adapter():
                assert model.active_adapters == []
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.equal(model(x), y)
    assert (bits(model), vars(model.adapter_plan)) == (before, plan)


@pytest.mark.parametrize("merged", [False, True])
def test_an_unknown_name_changes_nothing(case, bits, merged):
    model = case.adapted("french", "formal")
    if merged:
        model.merge_adapter()
    before, plan = bits(model), vars(model.adapter_plan).copy()
    with pytest.raises(AdapterError, match=r"no adapter named 'frensh'.*'french', 'formal'; did you mean 'french'"):
        model.using("frensh").__enter__()
    assert (bits(model), vars(model.adapter_plan)) == (before, plan)


def test_what_is_merged_inside_is_unmerged_at_the_end(case, bits):
    model, x = case.adapted("a", "b"), case.x(3)
    before, y = bits(model), model(x)
    with model.using("b"):
        model.merge_adapter()
    assert bits(model) == before
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_deleted_inside_acts_no_more(case, merged):
    model, x = case.adapted("a", "b"), case.x(3)
    model.set_adapter(["a", "b"])
    if merged:
        model.merge_adapter()
    with model.using([]):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    torch.testing.assert_close(model(x), case.dense(model.layer, {"b": 1.0} if not merged else {}, x))


def test_requires_grad_is_left_alone(case):
    model = case.adapted("a", "b")
    model.layer.adapters["b"].requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.set_adapter("b")
    with model.using("a"), model.disable_adapter():
        pass
    model.merge_adapter("a")
    model.unmerge_adapter()
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
