"""transformers' Trainer and accelerate, as they are: they train, save, resume and pick the best as of any model."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, set_seed

from veneer import AdapterError, LoraConfig, PeftModel, get_peft_model

ROWS = [{"input_ids": row, "labels": row} for row in (torch.arange(96).view(12, 8) * 7 % 64)]
CONFIG = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)


@pytest.fixture
def train(tiny, tmp_path):
    """`train(3)` trains a fresh model for three steps and returns its trainer."""

    def run(steps, folder="run", config=CONFIG, resume=None, model=None, **settings):
        torch.manual_seed(0)
        model = model or get_peft_model(tiny("llama"), config)
        more = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "report_to": []}
        more |= {"learning_rate": 0.05, **settings}
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=2, use_cpu=True,
            lr_scheduler_type="constant", disable_tqdm=True, dataloader_pin_memory=False, **more,
        )  # fmt: skip
        set_seed(0)
        trainer = Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


OTHERS = {
    "lora": CONFIG,
    "pissa": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    "vera": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], peft_type="VERA"),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_a_resumed_run_is_the_uninterrupted_one(train, config):
    whole = train(5, "whole", config=config)
    train(2, config=config)
    resumed = train(5, config=config, resume=True)
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == 5
    assert trained(resumed.model).keys() == trained(whole.model).keys()
    assert all(torch.equal(value, trained(whole.model)[name]) for name, value in trained(resumed.model).items())


def test_a_checkpoint_holds_the_adapter_only(train, tiny, tmp_path):
    trainer = train(2)
    folder = tmp_path / "run" / "checkpoint-2"
    held = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert held
    assert all("lora_" in name or ".adapters." in name for name in held)
    assert not [*folder.glob("pytorch_model*")]
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    again = PeftModel.from_pretrained(tiny("llama"), folder)
    again.load_state_dict(trainer.model.state_dict())
    loaded = PeftModel.from_pretrained(again.unload(), folder)
    trainer.model.eval()
    assert torch.equal(loaded(ROWS[0]["input_ids"][None]).logits, trainer.model(ROWS[0]["input_ids"][None]).logits)
    trainer.save_model(str(tmp_path / "final"))
    assert {f.name for f in (tmp_path / "final").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "final" / "model.safetensors").exists()


def test_several_adapters_that_train_at_once_are_resumed(train, tiny):
    def two():
        torch.manual_seed(0)
        model = get_peft_model(tiny("llama"), CONFIG, "a")
        model.add_adapter("b", LoraConfig(r=3, target_modules=["up_proj"]))
        model.set_adapter({"a": 1.0, "b": 0.5})
        return model

    whole = train(4, "whole", model=two())
    train(2, model=two())
    resumed = train(4, model=two(), resume=True)
    assert losses(resumed) == losses(whole)


def test_the_best_model_is_loaded_at_the_end(train):
    # the "best" has the largest loss, so that it is not the last
    steps = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1.0, "greater_is_better": True}
    trainer = train(6, load_best_model_at_end=True, **steps)
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert len(evaluated) == 3
    assert trainer.state.best_metric == max(evaluated.values())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    assert trainer.state.best_metric > evaluated[6]


def test_a_checkpoint_of_another_adapter_is_refused(train, tiny, tmp_path):
    train(2)
    model = get_peft_model(tiny("llama"), CONFIG, "other")
    with pytest.raises(AdapterError, match=r"of other adapters than the model has: .*\.adapters\.default\."):
        train(4, model=model, resume=True)


def test_label_smoothing_and_gradient_checkpointing_of_trainer(train):
    plain = train(2, "plain", label_smoothing_factor=0.1)
    kwargs = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    assert losses(train(2, "again", label_smoothing_factor=0.1, **kwargs)) == losses(plain)


def test_accelerate_prepares_saves_and_restores(tiny, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = get_peft_model(tiny("llama"), CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert accelerator.unwrap_model(prepared) is model

    def step():
        loss = prepared(ROWS[0]["input_ids"][None], labels=ROWS[0]["labels"][None]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    model.train()
    step()
    accelerator.save_state(str(tmp_path / "state"))
    after = [step(), step()]
    accelerator.load_state(str(tmp_path / "state"))
    assert [step(), step()] == after
    unwrapped = accelerator.unwrap_model(prepared)
    unwrapped.save_pretrained(
        tmp_path / "one", is_main_process=True, save_function=accelerator.save, state_dict=model.state_dict()
    )
    unwrapped.save_pretrained(tmp_path / "other", is_main_process=False, save_function=accelerator.save)
    assert (tmp_path / "one" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "other").exists()


def test_transformers_own_names_for_switching_off(tiny):
    model, row = get_peft_model(tiny("llama"), LoraConfig(r=2, init_lora_weights=False)), ROWS[0]["input_ids"][None]
    adapted = model(row).logits
    model.disable_adapters()
    with model.disable_adapter():
        base = model(row).logits
    model.disable_adapters()
    assert torch.equal(model(row).logits, base)
    assert not torch.equal(base, adapted)
    model.enable_adapters()
    model.enable_adapters()
    assert torch.equal(model(row).logits, adapted)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="while 'default' is merged"):
        model.disable_adapters()
    with pytest.raises(AdapterError, match="while 'default' is merged"):
        model.load_state_dict(model.state_dict())


def test_weights_of_a_base_are_loaded_into_an_adapted_model(tiny):
    model, base = get_peft_model(tiny("llama"), CONFIG), tiny("llama")
    told = model.load_state_dict(base.state_dict(), strict=False)
    assert told.missing_keys
    assert all(".adapters." in key for key in told.missing_keys)
    assert torch.equal(model(ROWS[0]["input_ids"][None]).logits, base(ROWS[0]["input_ids"][None]).logits)
    other = get_peft_model(tiny("llama"), LoraConfig(r=3, target_modules=CONFIG.target_modules)).state_dict()
    with pytest.raises(AdapterError, match=r"layers\.\*\.self_attn\.q_proj\.adapters\.default\.A \(2\)"):
        model.load_state_dict(other, strict=False)
