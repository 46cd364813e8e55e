"""A UNet of diffusers is a model like any other."""

import torch

from veneer import LoraConfig, PeftModel, get_peft_model

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def test_a_unet_learns_saves_and_loads(unet, tmp_path):
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 7]),
        "encoder_hidden_states": torch.randn(2, 3, 8),
    }
    before = unet(**inputs).sample
    model = get_peft_model(unet, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    assert model is unet
    after = model(**inputs).sample
    assert (after - before).abs().max() > 1e-4
    after.square().mean().backward()
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None} == {"default"}
    model.save_pretrained(tmp_path)
    base = model.unload()
    assert torch.equal(base(**inputs).sample, before)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(**inputs).sample, after)
