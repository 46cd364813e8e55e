"""Merge: merged equals live; unmerge gives the bits back; it is the whole model or nothing."""

import pytest
import torch
from torch import nn

from veneer import AdapterError
from veneer.core.kinds.layer import AdaptedLayer

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BLENDS = [["a"], ["a", "b"], {"a": 0.7, "b": -1.3}]


@pytest.mark.parametrize("blend", BLENDS, ids=str)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
def test_merged_equals_live(case, dtype, near, blend):
    model, x = case.adapted("a", "b", dtype=dtype), case.x(3, dtype=dtype)
    model.set_adapter(blend)
    live = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), live, rtol=near, atol=near)
    assert model.active_adapters == list(blend)
    torch.testing.assert_close(model.merge_and_unload()(x), live, rtol=near, atol=near)


@pytest.mark.parametrize("blend", BLENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", [False, True], ids=["own precision", "cast with the model"])
def test_the_merged_weight_is_the_exact_sum_rounded_once(case, dtype, blend, cast):
    model = case.adapted("a", "b", dtype=dtype)
    model = model.to(dtype) if cast else model
    layer, weights = model.layer, blend if isinstance(blend, dict) else dict.fromkeys(blend, 1.0)
    exact = case.changed(layer, weights)
    works_in = max(torch.finfo(parameter.dtype).eps for parameter in case.parameters(model))
    model.merge_adapter(blend)
    for part, matrix in case.kind.matrices(layer).items():
        size = exact[part].abs()
        most = torch.finfo(dtype).eps / 2 * size + 16 * works_in * size.max()  # half a last place, and the sum's error
        assert ((matrix - exact[part]).abs() <= most).all()
    assert all(parameter.is_contiguous() for parameter in layer.parameters(recurse=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerge_gives_the_bits_back_however_often(case, bits, dtype):
    model = case.adapted("a", "b", dtype=dtype)
    before, live = bits(model), model(x := case.x(3, dtype=dtype))
    for blend in (["a"], {"b": 3.0, "a": -2.0}, ["a"]):
        model.merge_adapter(blend)
        assert bits(model).keys() == before.keys()
        assert bits(model) != before
        model.unmerge_adapter()
        assert bits(model) == before
    assert torch.equal(model(x), live)


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_merge_that_gives_nan_in_a_later_layer_changes_nothing(case, bits, fault):
    model = case.adapted(base=case.stack(), targets=["layer", "head"])
    for parameter in model.head.adapters.parameters():
        nn.init.constant_(parameter, fault)
    before, plan = bits(model), vars(model.adapter_plan).copy()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match="'default' gives NaN or infinity in head"):
            merge()
    assert (bits(model), vars(model.adapter_plan)) == (before, plan)
    assert model.layer.adapters.original is None


def test_a_failure_half_way_changes_nothing(case, bits, monkeypatch):
    model = case.adapted(base=case.stack(), targets=["layer", "head"])
    before, changed = bits(model), AdaptedLayer.changed

    def fails_later(layer, *terms):
        if layer is model.head:
            raise MemoryError
        return changed(layer, *terms)

    monkeypatch.setattr(AdaptedLayer, "changed", fails_later)
    with pytest.raises(MemoryError):
        model.merge_adapter()
    assert bits(model) == before


def _first(case, base) -> str:
    """The first parameter that the case changes."""
    layer = base.layer
    name = next(iter(case.example.parameters or case.kind.values(layer, case.kind.matrices(layer))))
    if "." in name:
        pytest.skip("a parameter of a module inside")
    return name


@pytest.mark.filterwarnings("ignore:.*are one weight, and only")
@pytest.mark.parametrize("targets", [["layer"], ["layer", "twin"]], ids=str)
def test_a_tied_weight_is_refused_by_name(case, bits, targets):
    base = case.base()
    base.add_module("twin", case.example.make().double())
    name = _first(case, base)
    setattr(base.twin, name, getattr(base.layer, name))
    if case.example.parameters:
        targets = ["layer"]
    model = case.adapted(base=base, targets=targets)
    before = bits(model)
    with pytest.raises(AdapterError, match=rf"other layers share: layer\.{name} and twin\.{name}"):
        model.merge_adapter()
    assert bits(model) == before


def test_a_computed_weight_is_refused_by_name(case, bits):
    base = case.base()
    name = _first(case, base)
    weight = getattr(base.layer, name).detach()
    delattr(base.layer, name)
    if case.example.parameters or case.is_copy:
        with pytest.raises(AdapterError, match=f"'layer.{name}' matches no parameter|without parameters"):
            case.adapted(base=base)
        return
    setattr(base.layer, name, weight)  # no parameter: a hook or a parametrization puts another here at every forward
    model, x = case.adapted(base=base), case.x(3)
    before = bits(model), model(x)
    with pytest.raises(AdapterError, match="computed from other parameters: 'layer"):
        model.merge_adapter()
    assert bits(model) == before[0]
    assert torch.equal(model(x), before[1])


def test_unload_gives_back_the_base_and_its_classes(case, bits):
    base = case.base()
    before, kinds = bits(base), [type(module) for module in base.modules()]
    for merged in (False, True):
        model = case.adapted(base=base)
        if merged:
            model.merge_adapter()
        assert model.unload() is base
        assert bits(base) == before
        assert [type(module) for module in base.modules()] == kinds
        assert all("adapters" not in vars(module)["_modules"] for module in base.modules())


def test_what_would_be_wrong_while_merged_is_refused(case):
    model = case.adapted("a", "b")
    model.merge_adapter("a")
    for wrong in (model.merge_adapter, lambda: model.set_adapter("b"), lambda: model.delete_adapter("a")):
        with pytest.raises(AdapterError, match="'a' is merged"):
            wrong()
    model.unmerge_adapter()
    with pytest.raises(AdapterError, match="nothing is merged"):
        model.unmerge_adapter()
    model.set_adapter([])
    with pytest.raises(AdapterError, match="no adapter acts: name some to merge of 'a', 'b'"):
        model.merge_adapter()
