"""Full fine-tuning, LoRA and the head alone on SST-2: python benchmarks/sst2.py --data DIR [--steps 90] [--seeds 0 1 2]

DIR holds train.txt and dev.txt, a label (0 or 1) and a sentence a line. minilm-l6 learns by veneer, and by the Trainer
of transformers with PEFT where it has something to do: the same head at first, the same rows and settings, a process
of its own for each, one after the other. Prints for each side the accuracy on all of dev (mean, least and most over the
seeds), how much it trains, the median time of a step, and the most memory of its process; of the peer also how many
times veneer's its step takes, and veneer's memory as a share of its own.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RATES = {"full": 1e-4, "lora": 1e-3, "head": 5e-3}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["query", "key", "value", "dense"]}
NAMES = {"full": "full fine-tuning", "lora": "LoRA r=16", "head": "head alone"}
BATCH = 16


@dataclass(frozen=True)
class Job:
    """One training."""

    folder: Path
    way: str
    seed: int
    steps: int
    dtype: str

    @property
    def base(self) -> Path:
        """minilm-l6 with the head that both sides begin with."""
        return self.folder / f"base-{self.seed}"

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of train or of dev."""
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def veneer_side(job: Job) -> dict[str, float]:
    """veneer's own loop; without a LoRA the same one, over what else requires gradients."""
    from veneer.train.loop import Outcome, Watcher, train
    from veneer.train.optimizers import Stepper
    from veneer.train.record import peak_memory
    from veneer.train.run import read_recipe
    from veneer.train.task import Reporter

    adapter = LORA if job.way == "lora" else {"target_modules": [], "modules_to_save": ["classifier"]}
    values = {
        "base": job.base,
        "dtype": job.dtype,
        "device": "cpu",
        **{f"adapter.{key}": value for key, value in adapter.items()},
        "data.path": job.folder / "train.jsonl",
        "data.eval_path": job.folder / "dev.jsonl",
        "train.steps": job.steps,
        "train.batch_size": BATCH,
        "train.lr": RATES[job.way],
        "train.schedule": "linear",
        "train.warmup": 0,  # the two sides count its steps differently
        "train.seed": job.seed,
    }
    recipe, build = read_recipe(
        "sequence-classification", [f"{k}={json.dumps(v, default=str)}" for k, v in values.items()]
    )
    task = build(recipe, Reporter())
    if job.way == "full":
        for name, parameter in task.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or not name.startswith("classifier."))
    times = [time.perf_counter()]

    class Clock(Watcher):
        def stepped(self, record: dict[str, float], steps: int) -> bool:
            times.append(time.perf_counter())
            return False

    outcome = Outcome(0, 0.0)
    train(task, Stepper(task.model, recipe.train), recipe.train, Clock(), outcome)
    if outcome.failure:
        raise RuntimeError(outcome.failure)
    peak = peak_memory()
    trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    return {**figures(times, trained, peak), "accuracy": task.evaluate(whole=True)["accuracy"]}


def peer_side(job: Job) -> dict[str, float]:
    """transformers' Trainer; with PEFT where LoRA is trained."""
    import torch
    from transformers import AutoTokenizer, DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback, set_seed
    from transformers.utils import logging

    from veneer.train.record import peak_memory

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    set_seed(job.seed)
    model, tokenizer = _peer_model(job), AutoTokenizer.from_pretrained(job.base)
    rows, held_out = ([_tokens(row, tokenizer) for row in job.rows(name)] for name in (f"steps-{job.seed}", "dev"))
    collate = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, _arguments(job), train_dataset=rows, data_collator=collate, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    peak = peak_memory()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    said = torch.from_numpy(trainer.predict(held_out).predictions).argmax(1).tolist()
    right = sum(a == row["labels"] for a, row in zip(said, held_out, strict=True))
    return {**figures(times, trained, peak), "accuracy": right / len(held_out)}


def _peer_model(job: Job) -> Any:
    import peft
    from transformers import AutoModelForSequenceClassification

    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks transformers for a name of old
    model = AutoModelForSequenceClassification.from_pretrained(job.base)
    if job.way == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **LORA))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(job.way == "full" or name.startswith("classifier"))
    return model


def _arguments(job: Job) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(job.folder / "peer"),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        max_steps=job.steps,
        learning_rate=RATES[job.way],
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        bf16=job.dtype == "bfloat16",
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=job.seed,
        dataloader_pin_memory=False,
    )


def _tokens(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    return {**tokenizer(row["text"], truncation=True, max_length=256), "labels": int(row["label"])}


def figures(times: list[float], trained: int, peak: int) -> dict[str, float]:
    """What a training took; the first two steps, in which things are made ready, are not timed."""
    steps = [after - before for before, after in pairwise(times)]
    return {"seconds": statistics.median(steps[2:] or steps), "trained": trained, "peak": peak / 1e9}


SIDES = {"veneer": veneer_side, "peer": peer_side}


def prepare(data: Path, folder: Path, seeds: list[int], steps: int) -> None:
    """Write the rows, those of each seed's steps in their order, and each seed's base with a head."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from transformers.utils import logging

    from veneer import zoo
    from veneer.train.loop import rows_of
    from veneer.train.settings import TrainSettings

    place = zoo.resolve("minilm-l6")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for seed in seeds:
        set_seed(seed)
        AutoModelForSequenceClassification.from_pretrained(place, num_labels=2).save_pretrained(folder / f"base-{seed}")
        AutoTokenizer.from_pretrained(place).save_pretrained(folder / f"base-{seed}")
    for name in ("train", "dev"):
        pairs = [line.partition(" ") for line in (data / f"{name}.txt").read_text(encoding="utf-8").splitlines()]
        rows = [json.dumps({"text": text, "label": int(label)}) + "\n" for label, _, text in pairs]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        if name == "train":
            for seed in seeds:
                settings = TrainSettings(batch_size=BATCH, seed=seed)
                order = [i for step in range(steps) for batch in rows_of(step, settings, len(rows)) for i in batch]
                (folder / f"steps-{seed}.jsonl").write_text("".join(rows[i] for i in order), encoding="utf-8")


def show(found: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """The table."""
    columns = ("accuracy", "least", "most", "trained", "s/step", "peak GB", "time ×", "memory ×")
    print(f"{'':26}", *(f"{name:>9}" for name in columns))
    for way, sides in found.items():
        middle = {side: {k: statistics.median(run[k] for run in runs) for k in runs[0]} for side, runs in sides.items()}
        for side, runs in sides.items():
            accuracies, own = [run["accuracy"] for run in runs], middle[side]
            cells = [f"{f(accuracies):9.4f}" for f in (statistics.mean, min, max)]
            cells += [f"{own['trained']:9,.0f}", f"{own['seconds']:9.3f}", f"{own['peak']:9.2f}"]
            if side != "veneer":
                ours = middle["veneer"]
                cells += [f"{own['seconds'] / ours['seconds']:9.2f}", f"{ours['peak'] / own['peak']:9.2f}"]
            name = "veneer" if side == "veneer" else "Trainer" if way != "lora" else "PEFT"
            print(f"{NAMES[way]:17} {name:8}", *cells)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of train.txt and dev.txt")
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast there")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    found: dict[str, dict[str, list[dict[str, float]]]] = {way: {side: [] for side in SIDES} for way in options.ways}
    with tempfile.TemporaryDirectory() as folder:
        prepare(options.data, Path(folder), options.seeds, options.steps)
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            for seed in options.seeds:
                for way in options.ways:
                    for side in SIDES if seed % 2 else reversed(SIDES):
                        job = Job(Path(folder), way, seed, options.steps, options.dtype)
                        run = pool.submit(SIDES[side], job).result()
                        found[way][side].append(run)
                        print(f"{way} {side} seed {seed}: {run}", file=sys.stderr, flush=True)
    print(f"SST-2, minilm-l6 in {options.dtype}: {options.steps} steps of {BATCH} rows, seeds {options.seeds}")
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
