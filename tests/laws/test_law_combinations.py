"""Every method on every kind: it changes nothing at first, is its definition, merges and is saved, or is refused."""

import pytest
import torch

from veneer import AdapterError, PeftModel, get_peft_model


def test_every_combination_is_right_or_refused(combination, bits, tmp_path):
    case, reason = combination
    base, x = case.base(), case.x(3)
    untouched, before = base(x), bits(base)
    if reason:
        with pytest.raises(AdapterError, match=reason):
            get_peft_model(base, case.config())
        assert bits(base) == before
        return
    assert torch.equal(get_peft_model(base, case.config())(x), untouched)
    model = case.adapted(base=base.unload())
    live = model(x)
    assert not torch.allclose(live, untouched)
    torch.testing.assert_close(live, case.dense(model.layer, {"default": 1}, x), rtol=1e-12, atol=1e-12)
    model.save_pretrained(tmp_path)
    with torch.no_grad():  # attention has another path where nothing learns
        live = model(x)
        again = PeftModel.from_pretrained(model.unload(), tmp_path)
        assert torch.equal(again(x), live)
    if again.layer.shifted() and again.layer.bias is None:
        with pytest.raises(AdapterError, match=r"layers that have none: 'layer\.bias'"):
            again.merge_and_unload()
        return
    torch.testing.assert_close(again.merge_and_unload()(x), live, rtol=1e-12, atol=1e-12)
