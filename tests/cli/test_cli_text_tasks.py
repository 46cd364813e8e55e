"""`veneer train`, `generate` and `merge` of the tasks text-to-text and preference, on tiny genuine models."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

SIZES = {
    "t5": {
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu",
    },
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
        "dropout": 0.0,
    },
}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records(folder) if "loss" in record]


@pytest.fixture(scope="session")
def two_parts(tmp_path_factory, tiny_base):
    """`two_parts("t5")`: a tiny model of that family in a folder, whose tokenizer ends texts with </s>."""
    from tokenizers import processors

    def build(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        begin = "<|im_start|> " if family == "bart" else ""
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin}$A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
        )
        tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = transformers.AutoConfig.for_model(family, vocab_size=len(tokenizer), **ids, **SIZES[family])
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
        return folder

    return build


@pytest.fixture(params=["t5", "bart"])
def pairs(request, two_parts, recipe) -> Path:
    """The recipe, for a model of an encoder and a decoder."""
    values = yaml.safe_load(recipe.read_text())
    values |= {"task": "text-to-text", "base": str(two_parts(request.param))}
    values["eval"]["beams"] = 2
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def test_text_to_text(veneer, pairs, tmp_path, rows):
    said = veneer("train", pairs, "adapter.lora_dropout=0.1")
    assert said.code == 0, said.err
    run = tmp_path / "runs/small-1"
    measured = [record for record in records(run) if "eval_loss" in record]
    assert measured[1]["eval_loss"] < measured[0]["eval_loss"]
    assert measured[0].keys() == {"step", "eval_loss", "perplexity", "bleu", "rouge_l", "chrf", "exact_match"}
    assert json.loads((run / "adapter/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    prompt = "name: Inn 3\n"
    streamed = veneer("generate", run, "--prompt", prompt, "--max-new-tokens", 5)
    assert streamed.code == 0, streamed.err
    beams = veneer("generate", run, "--prompt", prompt, "--max-new-tokens", 5, "--beams", 3)
    assert beams.code == 0, beams.err
    assert veneer("generate", run, "--input", rows, "--max-new-tokens", 2).code == 0
    said = veneer("merge", run, "--out", tmp_path / "merged")
    assert said.code == 0, said.err
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    answers = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(answers[0], skip_special_tokens=True).strip() == streamed.out.strip()


@pytest.fixture
def preferences(recipe, tmp_path) -> Path:
    """The recipe, with rows of which the chosen completion is the one that names an inn."""
    lines = [
        {"prompt": f"name: Inn {i}\n", "chosen": f"The Inn {i} is a pub.", "rejected": "It is a place to eat, is it?"}
        for i in range(40)
    ]
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = yaml.safe_load(recipe.read_text())
    values |= {"task": "preference", "data": {"path": str(path), "eval_share": 0.2}, "eval": {"rows": 20}}
    values["adapter"]["lora_dropout"] = 0.1
    values["train"]["steps"] = 6
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def test_preference(veneer, preferences, tmp_path):
    said = veneer("train", preferences)
    assert said.code == 0, said.err
    run = tmp_path / "runs/small-1"
    first, last = (record for record in records(run) if "eval_loss" in record)
    assert first == {"step": 0, "eval_loss": pytest.approx(math.log(2), abs=1e-7), "accuracy": 0.5, "margin": 0.0}
    assert steps(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["eval_loss"] < first["eval_loss"]
    assert last["margin"] > 0
    assert last["accuracy"] == 1.0
    assert veneer("generate", run, "--prompt", "name: Inn 3\n", "--max-new-tokens", 2).code == 0
    assert veneer("merge", run, "--out", tmp_path / "merged").code == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("task", ["preference", "text-to-text"])
def test_a_run_that_was_cut_short_ends_with_the_same_bits(
    veneer, request, recipe, tmp_path, monkeypatch, two_parts, task
):
    from veneer.train.language.text_task import TextTask

    if task == "preference":
        request.getfixturevalue("preferences")
        usual = ()
    else:
        usual = ("task=text-to-text", f"base={two_parts('t5')}")  # whose own dropout acts too
    usual += (
        *("adapter.lora_dropout=0.1", "adapter.use_dora=true", "train.accumulation=2", "train.steps=6"),
        *("train.pass_tokens=100", "sample.count=0", "checkpoint.every_steps=2"),
    )
    usual += () if task == "preference" else ("eval.answers=0",)
    assert veneer("train", recipe, *usual, "name=whole").code == 0
    losses, calls = TextTask.losses, []

    def cutting(self, batch, *more):
        calls.extend([1] * self.model.training)
        if len(calls) == 7 and self.model.training:
            signal.raise_signal(signal.SIGTERM)
        return losses(self, batch, *more)

    with monkeypatch.context() as patch:
        patch.setattr(TextTask, "losses", cutting)
        assert veneer("train", recipe, *usual).code == 128 + signal.SIGTERM
    cut, whole = (tmp_path / f"runs/{name}-1" for name in ("small", "whole"))
    assert 0 < len(steps(cut)) < 6
    said = veneer("train", recipe, *usual, "--resume")
    assert said.code == 0, said.err
    assert steps(cut) == steps(whole)
    one, two = ((run / "adapter/adapter_model.safetensors").read_bytes() for run in (cut, whole))
    assert one == two


@pytest.mark.parametrize(
    ("task", "base", "message"),
    [
        ("causal-lm", "t5", "a t5 is an encoder and a decoder; say task=text-to-text"),
        ("text-to-text", "", "a llama is a decoder; say task=causal-lm"),
    ],
)
def test_a_base_of_another_kind_is_refused(veneer, recipe, two_parts, task, base, message):
    own = (f"base={two_parts(base)}",) if base else ()
    said = veneer("train", recipe, f"task={task}", *own)
    assert said.code == 2
    assert message in said.err


@pytest.mark.parametrize("name", ["causal-lm", "text-to-text", "preference"])
def test_a_copied_recipe_is_whole(veneer, tmp_path, name):
    """With its commented lines, too."""
    from veneer.train.run import read_recipe

    assert veneer("recipes", "copy", name, tmp_path / "my.yaml").code == 0
    text = (tmp_path / "my.yaml").read_text()
    (tmp_path / "train.jsonl").write_text("{}")
    asked = [line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line for line in text.splitlines()[1:]]
    (tmp_path / "all.yaml").write_text("\n".join(asked))
    for path in ("my.yaml", "all.yaml"):
        recipe, task = read_recipe(str(tmp_path / path))
        assert recipe.task == name
        assert isinstance(recipe, task.settings)
    assert recipe.data.prompt is not None
