"""What `train.py` starts: the rows, the bound, and the two sides, each in a process of its own."""

import json
import os
import random
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.utils import logging

import veneer
from turns import Turns, wait
from veneer import recipes
from veneer.train.bases.loading import choose_device
from veneer.train.loop import Outcome, Watcher, rows_of, train
from veneer.train.optimizers import Stepper
from veneer.train.run import read_recipe
from veneer.train.task import Reporter

ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TRAIN = {"lr": 2e-4, "schedule": "constant", "warmup": 0, "weight_decay": 0.0, "max_grad_norm": 1.0}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
LLAMA_1B |= {"num_key_value_heads": 4, "max_position_embeddings": 2048, "vocab_size": 32000}  # TinyLlama's
READS_EMBEDDINGS = re.compile(r"layers\.0\.self_attn\.[qkv]_proj$")  # no adapter lies below these layers
ROUNDS = 10  # of each measured product
warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks transformers for a name of old
logging.set_verbosity_error()
logging.disable_progress_bar()


@dataclass(frozen=True)
class Job:
    """One row of the table, and where its files are."""

    folder: Path
    base: str
    batch: int
    length: int | None  # None: pairs of E2E, their sentences learned; else rows of so many tokens, all learned
    dtype: str  # of veneer's base
    steps: int
    data: str | None
    overrides: tuple[str, ...]

    @property
    def model(self) -> Path:
        return self.folder / "base" if self.base == "llama-1b" else veneer.zoo.resolve(self.base)

    @property
    def start(self) -> Path:
        return self.folder / "start"

    def rows(self, name: str = "train") -> list[dict[str, list[int]]]:
        """The rows as tokens; those of `train` in the order of veneer's steps."""
        return json.loads((self.folder / f"{name}.tokens").read_text())

    def recipe(self, dropout: float) -> tuple[Any, Any]:
        """The recipe of veneer's side, and its task."""
        values = {
            "base": self.model,
            "dtype": self.dtype,
            **{f"adapter.{key}": value for key, value in ADAPTER.items()},
            "adapter.lora_dropout": dropout,
            "data.path": self.folder / "train.jsonl",
            "data.eval_share": 0,
            "data.max_length": self.length or 1024,
            **{f"train.{key}": value for key, value in TRAIN.items()},
            "train.batch_size": self.batch,
            "train.steps": self.steps,
        }
        return read_recipe("causal-lm", [*(f"{key}={value}" for key, value in values.items()), *self.overrides])


def veneer_side(job: Job, turn: Turns, folder: Path, dropout: float) -> None:
    """veneer's own training, from a recipe."""
    recipe, build = job.recipe(dropout)
    task = build(recipe, Reporter())
    task.model.hotswap_adapter(job.start)
    turn()

    class Pause(Watcher):
        def stepped(self, record: dict[str, float], steps: int) -> bool:
            turn(loss=record["loss"], tokens=record["tokens"])
            return False

    outcome = Outcome(0, 0.0)
    train(task, Stepper(task.model, recipe.train), recipe.train, Pause(), outcome)
    if outcome.failure:
        raise RuntimeError(outcome.failure)
    task.model.save_pretrained(folder)


def peft_side(job: Job, turn: Turns, folder: Path, dropout: float, dtype: str, autocast: bool = False) -> None:
    """transformers' Trainer over a model of PEFT, which pauses where it logs the loss of a step."""
    import peft
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Pause(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                turn(loss=logs["loss"])

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)
    config = peft.LoraConfig.from_pretrained(job.start)
    config.lora_dropout = dropout
    model = peft.PeftModel.from_pretrained(model, job.start, is_trainable=True, config=config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=job.batch,
        max_steps=job.steps,
        learning_rate=TRAIN["lr"],
        lr_scheduler_type="constant",
        weight_decay=TRAIN["weight_decay"],
        max_grad_norm=TRAIN["max_grad_norm"],
        optim="adamw_torch_fused",
        bf16=autocast,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=job.rows(),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(job.model)),
        callbacks=[Pause()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(folder)


def prepare(turn: Turns, job: Job) -> dict[str, Any]:
    """Write the base, the starting adapter and the rows; say how many tokens the steps have, and the bound."""
    pairs = {name: list(_texts(job, name)) for name in ("train", "held-out")}
    if job.base == "llama-1b":
        _random_llama(job, [prompt + completion for prompt, completion in pairs["train"]])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(job.model)
    veneer.get_peft_model(model, veneer.LoraConfig(**ADAPTER)).save_pretrained(job.start)
    del model
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    settings = job.recipe(0.0)[0].train
    order = {"train": [list(chain(*rows_of(step, settings, len(pairs["train"])))) for step in range(job.steps)]}
    for name, texts in pairs.items():
        names = ("prompt", "completion") if job.length is None else ("", "text")
        lines = [json.dumps({k: v for k, v in zip(names, text, strict=True) if k}) for text in texts]
        (job.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        rows = [_tokenised(*texts[i], tokenizer, job.length) for i in chain(*order.get(name, [range(len(texts))]))]
        (job.folder / f"{name}.tokens").write_text(json.dumps(rows))
    rows = job.rows()
    steps = [rows[i : i + job.batch] for i in range(0, len(rows), job.batch)]
    tokens = [sum(len(row["input_ids"]) for row in step) for step in steps]
    learned = [sum(label != -100 for row in step for label in row["labels"]) for step in steps]
    return {"tokens": tokens, "learned": learned, **_bound(job, sum(tokens) / job.steps, sum(learned) / job.steps)}


def _texts(job: Job, name: str) -> Iterator[tuple[str, str]]:
    """(prompt, completion) of each row; without a prompt, and longer than needed, where all of it is learned."""
    if job.data:
        pairs = [line.split("||") for line in Path(job.data).read_text(encoding="utf-8").splitlines()]
        last = sorted({facts for facts, _ in pairs})[-50:]
        pairs = [pair for pair in pairs if (pair[0] in last) == (name == "held-out")]
    else:
        lines = (recipes.SHIPPED / f"data/e2e/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [(row["facts"], row["sentence"]) for row in map(json.loads, lines)]
    draw = random.Random(0)
    if job.length is None:
        yield from ((facts.strip(), " " + sentence.strip()) for facts, sentence in draw.sample(pairs, len(pairs)))
        return
    for _ in range(job.steps * job.batch if name == "train" else 8):
        chosen = draw.sample(pairs, job.length // 20)  # three times as many tokens as are asked for
        yield "", "\n".join(f"{facts.strip()}: {sentence.strip()}" for facts, sentence in chosen)


def _tokenised(prompt: str, completion: str, tokenizer: Any, length: int | None) -> dict[str, list[int]]:
    head, tail = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, completion))
    ids = [*head, *tail, tokenizer.eos_token_id][:length]
    first = max(1, len(head))  # nothing stands before the first token
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * first + ids[first:]}


def _random_llama(job: Job, texts: list[str]) -> None:
    """1.1 billion random weights, and a tokenizer with no more words than they know."""
    tokenizer = AutoTokenizer.from_pretrained(veneer.zoo.resolve("smollm2-135m"))
    tokenizer = tokenizer.train_new_from_iterator(texts, LLAMA_1B["vocab_size"], show_progress=False)
    tokenizer.save_pretrained(job.model)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA_1B, **special)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(job.model)


def _bound(job: Job, tokens: float, learned: float) -> dict[str, Any]:
    """The products of a step that cannot be avoided, and how fast this machine multiplies them, by dtype.

    Forward and input gradient of the frozen layers, the latter not where no adapter lies below; forward, input
    gradient and weight gradient of A and B; forward and input gradient of the head at learned tokens. Attention's own
    products are not counted.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model))
    head, flops, shapes = model.get_output_embeddings(), 0.0, []
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        out, into, r = layer.out_features, layer.in_features, ADAPTER["r"]
        lowest = bool(READS_EMBEDDINGS.search(name))
        if layer is head:
            flops += 2 * learned * out * into * 2
        else:
            flops += 2 * tokens * (out * into * (2 - lowest) + r * (3 * out + 3 * into - lowest * into))
        shapes.append((int(learned if layer is head else tokens), out, into))
    dtypes = ["float32"] if job.dtype == "float32" else ["bfloat16", "float32"]
    return {"flops": flops, "rates": {dtype: _rate(shapes, getattr(torch, dtype)) for dtype in dtypes}}


def _rate(shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> float:
    """FLOP/s over layers of these shapes, each at the best of its times."""
    device, best = choose_device("auto"), {}
    for rows, out, into in set(shapes):
        x, weight = torch.randn(rows, into, dtype=dtype, device=device), torch.randn(out, into, device=device)
        weight = weight.to(dtype)
        best[rows, out, into] = min(_seconds(x, weight) for _ in range(ROUNDS))
    return sum(2 * rows * out * into for rows, out, into in shapes) / sum(best[shape] for shape in shapes)


def _seconds(x: Tensor, weight: Tensor) -> float:
    wait()
    began = time.perf_counter()
    F.linear(x, weight)
    wait()
    return time.perf_counter() - began


@torch.no_grad()
def evaluate(turn: Turns, job: Job, folders: dict[str, Path]) -> dict[str, float]:
    """The loss of each side's adapter on the held-out rows, all through the same float32 model of PEFT."""
    import peft

    device = choose_device("auto")
    base = AutoModelForCausalLM.from_pretrained(job.model, dtype="float32")
    model = peft.PeftModel.from_pretrained(base, job.start, "start").to(device).eval()
    losses, rows = {}, sorted(job.rows("held-out")[:100], key=lambda row: len(row["input_ids"]))
    for name, folder in folders.items():
        if name != "start":
            model.load_adapter(folder, name)
        model.set_adapter(name)
        total, count = 0.0, 0
        for row in rows:
            ids, labels = (torch.tensor([row[key]], device=device) for key in ("input_ids", "labels"))
            total += F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[0, 1:], reduction="sum").item()
            count += int((labels[0, 1:] != -100).sum())
        losses[name] = total / count
    return losses
