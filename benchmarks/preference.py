"""DPO beside trl's DPOTrainer with PEFT: python benchmarks/preference.py [--steps 20] [--batch 4] [--base FOLDER]

SmolLM2-135M learns to prefer a restaurant's own sentence of E2E (the shipped sample) to that of another one: β = 0.1,
AdamW, r=16 on all linear layers, both sides in float32, from the same adapter, on the same rows in the same order. The
two are processes of their own that take turns, a step each. Prints the losses and margins side by side, the medians of
a step's time and their ratio, and each process's peak memory. trl is not among veneer's packages: pip install trl.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from turns import Process

ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
RATE, BETA, SKIP = 1e-4, 0.1, 2  # steps in which things are made ready are not timed


@dataclass(frozen=True)
class Job:
    """The training that both sides do."""

    folder: Path
    base: Path
    steps: int
    batch: int

    @property
    def start(self) -> Path:
        """The adapter that both begin with."""
        return self.folder / "start"

    @property
    def rows(self) -> Path:
        """prompt, chosen, rejected."""
        return self.folder / "rows.jsonl"

    def recipe(self) -> tuple[Any, Any]:
        """veneer's recipe, and its task."""
        from veneer.train.run import read_recipe

        values = {
            "base": self.base,
            "dtype": "float32",
            **{f"adapter.{key}": value for key, value in ADAPTER.items()},
            "adapter.lora_dropout": 0,
            "data.path": self.rows,
            "data.eval_share": 0,
            "train.steps": self.steps,
            "train.batch_size": self.batch,
            "train.lr": RATE,
            "train.schedule": "constant",
            "train.warmup": 0,
            "train.beta": BETA,
        }
        return read_recipe("preference", [f"{key}={value}" for key, value in values.items()])


def veneer_side(job: Job, turn: Any) -> None:
    """veneer's own training, from a recipe."""
    import torch

    from veneer.train.loop import Outcome, Watcher, train
    from veneer.train.optimizers import Stepper
    from veneer.train.task import Reporter

    recipe, build = job.recipe()
    task = build(recipe, Reporter())
    task.model.hotswap_adapter(job.start)
    margins: list[Any] = []
    found = task.margins
    task.margins = lambda batch: margins.append(found(batch)) or margins[-1]

    class Pause(Watcher):
        def stepped(self, record: dict[str, float], steps: int) -> bool:
            turn(loss=record["loss"], margin=torch.cat(margins).mean().item())
            margins.clear()
            return False

    turn()
    outcome = Outcome(0, 0.0)
    train(task, Stepper(task.model, recipe.train), recipe.train, Pause(), outcome)
    if outcome.failure:
        raise RuntimeError(outcome.failure)


def peer_side(job: Job, turn: Any) -> None:
    """trl's DPOTrainer over a model of PEFT, which pauses where it logs a step."""
    import peft
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from veneer.train.loop import rows_of

    class Pause(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                turn(loss=logs["loss"], margin=logs["rewards/margins"])

    model = AutoModelForCausalLM.from_pretrained(job.base, dtype="float32")
    model = peft.PeftModel.from_pretrained(model, job.start, is_trainable=True)
    rows = [json.loads(line) for line in job.rows.read_text(encoding="utf-8").splitlines()]
    settings = job.recipe()[0].train
    order = chain.from_iterable(chain(*rows_of(step, settings, len(rows))) for step in range(job.steps))
    arguments = DPOConfig(
        output_dir=str(job.folder / "peer"),
        per_device_train_batch_size=job.batch,
        max_steps=job.steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=BETA,
        bf16=False,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=False,
    )
    data = Dataset.from_list([rows[i] for i in order])
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    trainer = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Pause()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


SIDES = {"veneer": veneer_side, "trl": peer_side}


def prepare(job: Job, turn: Any) -> None:
    """Write the rows and the adapter that both begin with."""
    import torch
    from transformers import AutoModelForCausalLM

    import veneer
    from veneer import recipes

    lines = (recipes.SHIPPED / "data/e2e/train.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [(row["facts"].strip(), " " + row["sentence"].strip()) for row in map(json.loads, lines)]
    others = [sentence for _, sentence in pairs[7:] + pairs[:7]]
    rows = [
        json.dumps({"prompt": facts, "chosen": own, "rejected": other}) + "\n"
        for (facts, own), other in zip(pairs, others, strict=True)
        if own != other
    ]
    job.rows.write_text("".join(rows), encoding="utf-8")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype="float32")
    veneer.get_peft_model(model, veneer.LoraConfig(**ADAPTER)).save_pretrained(job.start)


def side(turn: Any, job: Job, name: str) -> None:
    """What a process does."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    {"prepare": prepare, **SIDES}[name](job, turn)


def measure(job: Job) -> dict[str, list[dict[str, float]]]:
    """The steps of both sides, which take turns."""
    Process(side, job, "prepare", name="prepare").take()
    sides = {name: Process(side, job, name, name=name) for name in SIDES}
    for own in sides.values():
        own.take()
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for step in range(job.steps):
        for name in SIDES if step % 2 else reversed(SIDES):
            steps[name].append(sides[name].turn())
        print(f"{step + 1}/{job.steps}", end="\r", file=sys.stderr)
    for own in sides.values():
        own.turn()
    return steps


def show(job: Job, steps: dict[str, list[dict[str, float]]]) -> None:
    """Losses and margins step by step, and the figures."""
    print(f"DPO, {job.base.name} in float32: {job.steps} steps of {job.batch} comparisons, β = {BETA}")
    print("step", *(f"{f'{name} {what}':>14}" for what in ("loss", "margin") for name in SIDES))
    for number, own in enumerate(zip(*steps.values(), strict=True), 1):
        print(f"{number:4}", *(f"{one[what]:14.6f}" for what in ("loss", "margin") for one in own))
    times = {name: [one["seconds"] for one in own][min(SKIP, job.steps - 1) :] for name, own in steps.items()}
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    for name, own in steps.items():
        print(f"{name:7} {statistics.median(times[name]):.3f} s a step, peak {own[-1]['peak'] / 1e9:.2f} GB")
    off = max(abs(a["loss"] - b["loss"]) for a, b in zip(*steps.values(), strict=True))
    print(f"trl takes {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"the losses differ by {off:.2g} at most")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="the folder of another base; smollm2-135m, if not said")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if missing := [name for name in ("trl", "accelerate", "datasets", "peft") if find_spec(name) is None]:
        raise SystemExit(f"the peer is not installed: pip install {' '.join(missing)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from veneer import zoo

    base = options.base or zoo.resolve("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), base, options.steps, options.batch)
        steps = measure(job)
    show(job, steps)
    if options.json:
        options.json.write_text(json.dumps(steps, indent=1))


if __name__ == "__main__":
    main()
