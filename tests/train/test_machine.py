"""What a run asks of the machine: oneDNN's products of fp32, large pages. Neither changes what is computed."""

import platform

import pytest
import torch

from veneer.train import pages, products


def exactness() -> float:
    x, weight = torch.randn(300, 700), torch.randn(700, 200)
    wide = x.double() @ weight.double()
    return float((x @ weight - wide).norm() / wide.norm())


@pytest.mark.parametrize("amd", [True, False])
def test_products_of_fp32_are_of_fp32_and_afterwards_as_before(monkeypatch, amd):
    monkeypatch.setattr(products, "_is_amd", lambda: amd)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with products.quick_products():
        assert exactness() < products.EXACT
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_where_they_would_be_rounded_they_are_left_alone(monkeypatch):
    monkeypatch.setattr(products, "_is_amd", lambda: True)
    monkeypatch.setattr(products, "EXACT", 0.0)  # as on a CPU that rounds to bf16
    before = torch.backends.mkldnn.matmul.fp32_precision
    with products.quick_products():
        assert torch.backends.mkldnn.matmul.fp32_precision == before


def held() -> int:
    from veneer.train.record import held_memory

    return held_memory()


@pytest.mark.parametrize("libc", [platform.libc_ver()[0], "musl"])
def test_large_pages_take_no_memory_until_they_are_used(monkeypatch, libc):
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
    before = held()
    pages.use_large_pages(2**30)
    assert held() - before < 2**27
    assert torch.ones(2**24).sum() == 2**24
