"""One of two processes that train the same model, for test_ecosystem_distributed: its rank, and a folder of both."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from veneer import AdapterError, LoraConfig, PeftModel, get_peft_model

SETTINGS = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
TOKENS = torch.arange(20).view(4, 5)


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.AutoConfig.for_model("llama", **sizes, vocab_size=64, num_key_value_heads=1)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def adapted(**settings: object) -> PeftModel:
    return get_peft_model(llama(), LoraConfig(**SETTINGS, **settings))


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    model.train()(tokens, labels=tokens).loss.backward()
    model = getattr(model, "module", model)
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def refuses(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(AdapterError, match=words):
        call()


def run(rank: int, folder: Path) -> None:
    own = TOKENS[2 * rank : 2 * rank + 2]
    wanted = gradients(adapted(), TOKENS)
    torch.testing.assert_close(gradients(DistributedDataParallel(adapted()), own), wanted, rtol=1e-4, atol=1e-5)
    model = sharded(adapted())
    torch.testing.assert_close(gradients(model, own), wanted, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        for settings in ({}, {"use_dora": True}, {"peft_type": "VERA"}):
            model = adapted(**settings)
            model.add_adapter("b", model.peft_config["default"])
            names = ["default", "b", "__base__", "b"]
            live, mixed = model(TOKENS).logits, copy.deepcopy(model)(TOKENS, adapter_names=names).logits
            assert isinstance(sharded(model), PeftModel)
            torch.testing.assert_close(model(TOKENS).logits, live)
            torch.testing.assert_close(model(TOKENS, adapter_names=names).logits, mixed)
            with model.disable_adapter():
                torch.testing.assert_close(model(TOKENS).logits, llama()(TOKENS).logits)
            place = folder / f"checkpoint-{len(settings)}"
            model.save_pretrained(place, "default", is_main_process=rank == 0)
            dist.barrier()
            torch.testing.assert_close(PeftModel.from_pretrained(llama(), place)(TOKENS).logits, live)
            model.load_state_dict(model.state_dict())
            dist.barrier()

    refuses("quantised or spread over processes: 'model.layers.0", model.merge_adapter)
    refuses("changed the class of this FSDPLlamaForCausalLM since", model.unload)
    refuses("adapt the model before fully_shard", lambda: model.add_adapter("c", LoraConfig(**SETTINGS)))
    refuses("adapt the model before fully_shard", lambda: get_peft_model(sharded(llama()), LoraConfig(**SETTINGS)))
    torch.testing.assert_close(model(TOKENS).logits, live)


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    run(rank, folder)
    dist.destroy_process_group()
