"""The losses in chunks equal the plain ones, and so do their gradients, whatever the head."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from veneer import LoraConfig, get_peft_model
from veneer.train.language import loss as losses
from veneer.train.language.loss import ends_with_head, learned_losses

TOKENS, SIZE, VOCABULARY = 300, 16, 70


def head_of(kind: str, dtype: torch.dtype) -> nn.Module:
    head = nn.Linear(SIZE, VOCABULARY, bias="bias" in kind, dtype=dtype)
    if "adapted" in kind:
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        return get_peft_model(nn.Sequential(head), config)[0]
    return head.requires_grad_("trained" in kind)


@pytest.mark.parametrize("kind", ["frozen", "frozen, bias", "adapted", "trained, bias"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_it_equals_the_plain_loss(kind, smoothing, dtype, near):
    head, hidden = head_of(kind, dtype), torch.randn(TOKENS, SIZE, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    trained = [hidden, *(own for own in head.parameters() if own.requires_grad)]
    found = learned_losses(hidden, head, targets, smoothing).sum()
    wanted = F.cross_entropy(head(hidden), targets, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(found, wanted, rtol=near, atol=0)
    pairs = zip(torch.autograd.grad(found / 7, trained), torch.autograd.grad(wanted / 7, trained), strict=True)
    for got, own in pairs:
        torch.testing.assert_close(got, own, rtol=10 * near, atol=near)


@pytest.mark.parametrize("kind", ["frozen", "frozen, bias", "adapted"])
def test_each_token_has_a_loss_and_a_gradient_of_its_own(kind):
    head, hidden = head_of(kind, torch.float64), torch.randn(TOKENS, SIZE, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(VOCABULARY, (TOKENS,)), torch.randn(TOKENS, dtype=torch.float64)
    found = learned_losses(hidden, head, targets)
    wanted = F.cross_entropy(head(hidden), targets, reduction="none")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad((weights * own.square()).sum(), hidden)[0] for own in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_large_logits_lose_nothing(smoothing):
    head, hidden = head_of("frozen", torch.float32), torch.eye(SIZE, requires_grad=True)
    with torch.no_grad():
        head.weight.add_(1e4)
    logits = head(hidden).double()
    found = learned_losses(hidden, head, logits.argmax(-1), smoothing).double()
    wanted = F.cross_entropy(logits, logits.argmax(-1), reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_logit_of_minus_infinity_is_a_token_that_is_never_said(smoothing):
    head, hidden = head_of("frozen, bias", torch.float32), torch.randn(3, SIZE, requires_grad=True)
    with torch.no_grad():
        head.bias[-1] = -torch.inf
    targets = torch.tensor([0, 1, VOCABULARY - 1])
    found = learned_losses(hidden, head, targets, smoothing)
    torch.testing.assert_close(
        found, F.cross_entropy(head(hidden), targets, reduction="none", label_smoothing=smoothing)
    )
    assert torch.autograd.grad(found[:2].sum(), hidden)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["frozen", "adapted"])
@pytest.mark.parametrize("grad", [True, False])
def test_all_logits_never_exist(kind, grad, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 10)
    head, hidden = head_of(kind, torch.float32), torch.randn(TOKENS, SIZE, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **kwargs or {})
            largest = max(largest, *(own.numel() for own in [out] if isinstance(own, torch.Tensor)), 0)
            return out

    with Watch(), torch.set_grad_enabled(grad):
        loss = learned_losses(hidden, head, torch.randint(VOCABULARY, (TOKENS,))).sum()
        if grad:
            loss.backward()
    assert largest <= TOKENS * SIZE


def test_no_learned_token_is_a_loss_of_nothing():
    head, hidden = head_of("frozen", torch.float32), torch.randn(0, SIZE, requires_grad=True)
    loss = learned_losses(hidden, head, torch.randint(VOCABULARY, (0,))).sum()
    loss.backward()
    assert loss == 0


def test_bf16_is_summed_in_fp32():
    head, hidden = head_of("frozen", torch.bfloat16), torch.randn(TOKENS, SIZE, dtype=torch.bfloat16)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    found = learned_losses(hidden, head, targets).sum()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(head(hidden).float(), targets, reduction="sum"))


@pytest.mark.parametrize(("family", "plain"), [("llama", True), ("gpt2", True), ("opt", True), ("gemma2", False)])
def test_what_changes_logits_after_the_head_is_found(tiny, family, plain):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    if family == "gemma2":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=1, head_dim=16, vocab_size=64)).eval()
    else:
        model = tiny(family)
    assert ends_with_head(model) == plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_s_own_gradient_is_not_rounded(dtype):
    """fp16's loss scale is 65536, which fp16 does not know; and 1/301 in bf16 would be off by a thousandth."""
    head, hidden = head_of("frozen", dtype), torch.randn(TOKENS, SIZE, dtype=dtype, requires_grad=True)
    loss = learned_losses(hidden, head, torch.randint(VOCABULARY, (TOKENS,))).sum()
    (one,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    for scale in (65536.0, 1 / 301):
        (found,) = torch.autograd.grad(loss * scale, hidden, retain_graph=True)
        assert torch.equal(found, (one.float() * scale).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_of_any_size_have_the_losses_of_fp64(dtype, size, smoothing):
    logits, targets = (size * torch.randn(TOKENS, VOCABULARY)).to(dtype), torch.randint(VOCABULARY, (TOKENS,))
    wanted = F.cross_entropy(logits.double(), targets, reduction="none", label_smoothing=smoothing)
    found = losses._losses_in_place(logits.clone(), targets[:, None], smoothing)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
