"""Products of fp32 are fp32's, whichever library makes them, and afterwards all is as before."""

import os

import pytest
import torch

from veneer.train import products

MATMUL = getattr(torch.backends.mkldnn, "matmul", None)
pytestmark = pytest.mark.skipif(MATMUL is None, reason="this torch says nothing of products' precision")


@pytest.mark.parametrize("sizes", [(1, 64, 64), (33, 17, 65), (300, 576, 128), (64, 128, 1000)], ids=str)
def test_products_are_exact_inside(monkeypatch, sizes):
    monkeypatch.setattr(products, "_is_amd", lambda: True)
    rows, inner, columns = sizes
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    wanted = x.double() @ weight.double().t()
    with products.quick_products():
        for found in (torch.nn.functional.linear(x, weight), torch.bmm(x[None], weight.t()[None])[0]):
            assert (found - wanted).norm() <= products.EXACT * wanted.norm()


@pytest.mark.parametrize(("amd", "exact", "inside"), [(True, True, "bf16"), (True, False, None), (False, True, None)])
def test_the_setting_is_put_back_also_after_an_error(monkeypatch, amd, exact, inside):
    monkeypatch.setattr(products, "_is_amd", lambda: amd)
    monkeypatch.setattr(products, "_is_exact", lambda: exact)
    before, there = MATMUL.fp32_precision, []

    def failing():
        with products.quick_products():
            there.append(MATMUL.fp32_precision)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert there == [inside or before]
    assert MATMUL.fp32_precision == before


@pytest.mark.parametrize("own", [None, "ONEDNN", "DNNL"])
def test_few_programs_are_kept_unless_the_user_has_said_how_many(monkeypatch, own):
    names = [f"{name}_PRIMITIVE_CACHE_CAPACITY" for name in ("ONEDNN", "DNNL")]
    for name in names:
        monkeypatch.setenv(name, "7")
        if not own or not name.startswith(own):
            monkeypatch.delenv(name)
    products.keep_few_programs()
    found = {name: os.environ[name] for name in names if name in os.environ}
    assert found == ({f"{own}_PRIMITIVE_CACHE_CAPACITY": "7"} if own else {names[0]: str(products.PROGRAMS)})
