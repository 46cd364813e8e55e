"""`veneer train`, `generate` and `merge`, on a tiny genuine model."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.train.language.speaker import Speaker
from veneer.train.language.tokens import encode_prompt


@pytest.fixture
def run(veneer, recipe, tmp_path):
    """A finished run's folder."""
    said = veneer("train", recipe)
    assert said.code == 0, said.err
    return tmp_path / "runs" / "small-1"


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(run):
    promised = {"adapter", "checkpoints", "loss.png", "metrics.jsonl", "recipe.yaml", "run.json", "samples"}
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == promised
    assert {path.name for path in (run / "adapter").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "veneer.json",
    }  # fmt: skip
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = [record for record in records(run) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert all(record.keys() == {"step", "loss", "lr", "tokens", "seconds"} for record in steps)
    measured = [record for record in records(run) if "eval_loss" in record]
    assert [record["step"] for record in measured] == [0, 4]
    assert measured[1]["eval_loss"] < measured[0]["eval_loss"]
    assert measured[1].keys() == {"step", "eval_loss", "perplexity", "bleu", "rouge_l", "chrf", "exact_match"}
    assert len((run / "samples" / "answers.jsonl").read_text().splitlines()) == 1


def test_the_recipe_of_a_run_repeats_it_to_the_bit(veneer, run):
    assert veneer("train", run / "recipe.yaml").code == 0
    again = run.parent / "small-2"
    one, two = ((folder / "adapter/adapter_model.safetensors").read_bytes() for folder in (run, again))
    assert one == two
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert resolved == yaml.safe_load((again / "recipe.yaml").read_text())


def test_overrides_and_accumulation(veneer, recipe, tmp_path):
    """Two batches of 4 in one step are one batch of 8: the loss is normalised over all learned tokens."""
    common = ("train.steps=2", "eval.answers=0", "sample.count=0")
    assert veneer("train", recipe, "name=whole", "train.batch_size=8", *common).code == 0
    assert veneer("train", recipe, "name=parts", "train.accumulation=2", *common).code == 0
    whole, parts = (
        [r["loss"] for r in records(tmp_path / "runs" / name) if "loss" in r] for name in ("whole-1", "parts-1")
    )
    assert whole == pytest.approx(parts, abs=1e-5)


def test_gradient_checkpointing_changes_no_bit(veneer, recipe, tmp_path):
    common = ("eval.answers=0", "sample.count=0", "adapter.lora_dropout=0.1")
    assert veneer("train", recipe, "name=kept", *common).code == 0
    assert veneer("train", recipe, "name=again", "train.gradient_checkpointing=true", *common).code == 0
    kept, again = (tmp_path / f"runs/{name}-1/adapter/adapter_model.safetensors" for name in ("kept", "again"))
    assert kept.read_bytes() == again.read_bytes()


def test_the_loss_is_that_of_the_learned_tokens(veneer, run, tiny_base, rows):
    """The held-out loss of step 0, by transformers' own loss over the same rows, one by one."""
    from veneer.train.language.parts import read_documents, tokenised
    from veneer.train.language.settings import LanguageData

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    data = LanguageData(path=str(rows), eval_share=0.2)
    part = tokenised(read_documents(data, 0)[1], tokenizer, data)
    total, count = 0.0, 0
    for example in part.examples:
        ids = torch.tensor([list(example.ids)])
        labels = ids.masked_fill(~torch.tensor([list(example.learned)]).bool(), -100)
        learned = int((labels[:, 1:] != -100).sum())
        total += model(ids, labels=labels).loss.item() * learned
        count += learned
    assert records(run)[0]["eval_loss"] == pytest.approx(total / count, abs=1e-5)


def test_dry_run_writes_nothing_and_shows_what_would_be(veneer, recipe, tmp_path):
    said = veneer("train", recipe, "--dry-run")
    assert said.code == 0, said.err
    assert not (tmp_path / "runs").exists()
    for words in ("adapted layers (14)", "trainable parameters", "memory, about", "rows are used", "The Inn"):
        assert words in said.out


@pytest.mark.parametrize(
    ("rows_text", "settings"),
    [
        ('{"text": "The Inn is a pub."}\n' * 8, ()),
        (
            '{"messages": [{"role": "user", "content": "An inn?"}, {"role": "assistant", "content": "A pub."}]}\n' * 8,
            (),
        ),
        ('{"instruction": "Name an inn.", "output": "The Inn."}\n' * 8, ()),
        ('{"q": "Where?", "a": "There."}\n' * 8, ("data.prompt={q} ", "data.completion={a}", "data.chat=true")),
    ],
)
def test_every_shape_trains(veneer, recipe, tmp_path, rows_text, settings):
    (tmp_path / "own.jsonl").write_text(rows_text)
    path = tmp_path / "own.jsonl"
    said = veneer("train", recipe, f"data.path={path}", f"data.eval_path={path}", "train.steps=2", *settings)
    assert said.code == 0, said.err


def test_generate_streams_compares_and_answers_files(veneer, run, rows, tmp_path):
    said = veneer("generate", run, "--prompt", "name: Inn 3\n", "--max-new-tokens", "5")
    assert said.code == 0, said.err
    speaker = Speaker.load(str(run), device="cpu")
    ids = encode_prompt("name: Inn 3\n", speaker.tokenizer, speaker.data)
    tokens = speaker.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    assert said.out == speaker.tokenizer.decode(tokens, skip_special_tokens=True).lstrip() + "\n"
    said = veneer("generate", run / "adapter", "--prompt", "name: Inn 3\n", "--compare", "--max-new-tokens", "5")
    assert "base" in said.out
    assert "adapted" in said.out
    out = tmp_path / "answers.jsonl"
    assert veneer("generate", run, "--input", rows, "--out", out, "--max-new-tokens", "3").code == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(answers) == 40
    assert answers[0]["prompt"] == "name: Inn 0\n"


def test_prompts_are_written_as_in_the_training(veneer, recipe, tmp_path):
    """A template of one column is filled with what is typed, and an input file needs no completions."""
    (tmp_path / "own.jsonl").write_text('{"q": "Where?", "a": "There."}\n' * 8)
    template = ("data.prompt=Question - {q} Answer -", "data.completion= {a}")
    said = veneer("train", recipe, f"data.path={tmp_path / 'own.jsonl'}", "data.eval_share=0", *template)
    assert said.code == 0, said.err
    speaker = Speaker.load(str(tmp_path / "runs/small-1"), dtype="float32", device="cpu")
    assert speaker.opening("Where?") == "Question - Where? Answer -"
    (tmp_path / "asked.jsonl").write_text('{"q": "Who?"}\n')
    assert speaker.read(tmp_path / "asked.jsonl") == ["Question - Who? Answer -"]


@pytest.mark.parametrize(
    ("row", "asked", "prompt"),
    [
        (
            {"messages": [{"role": "user", "content": "An inn?"}, {"role": "assistant", "content": "A pub."}]},
            {"messages": [{"role": "user", "content": "An inn?"}]},
            "<|im_start|>user\nAn inn?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            {"instruction": "An inn?", "output": "A pub."},
            {"instruction": "An inn?"},
            "completes the request.\n\n### Instruction:\nAn inn?\n\n### Response:\n",
        ),
        ({"question": "An inn?", "answer": "A pub."}, {"question": "An inn?"}, "An inn?"),
    ],
    ids=["messages", "alpaca", "question and answer"],
)
def test_what_is_typed_is_asked_as_the_training_asked_it(veneer, recipe, tmp_path, row, asked, prompt):
    (tmp_path / "own.jsonl").write_text((json.dumps(row) + "\n") * 8)
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked) + "\n")
    path = tmp_path / "own.jsonl"
    said = veneer("train", recipe, f"data.path={path}", f"data.eval_path={path}", "train.steps=1")
    assert said.code == 0, said.err
    speaker = Speaker.load(str(tmp_path / "runs/small-1"), device="cpu")
    typed = encode_prompt(speaker.opening("An inn?"), speaker.tokenizer, speaker.data)
    assert speaker.tokenizer.decode(typed).endswith(prompt)
    (read,) = speaker.read(tmp_path / "asked.jsonl")
    assert encode_prompt(read, speaker.tokenizer, speaker.data) == typed
    assert "--prompt 'An inn?'" in said.out


def test_merged_folder_answers_the_same_without_veneer(veneer, run, tiny_base, tmp_path):
    out = tmp_path / "merged"
    assert veneer("merge", run, "--out", out, "--dtype", "float32").code == 0
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
        f"m = M.from_pretrained({str(out)!r}); assert 'veneer' not in sys.modules\n"
        f"torch.save(m(torch.arange(3, 20)[None]).logits, {str(tmp_path / 'logits.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    live = PeftModel.from_pretrained(base, run / "adapter")(torch.arange(3, 20)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), live, atol=1e-5, rtol=0)


def test_ctrl_c_keeps_what_was_learned(veneer, recipe, tmp_path, monkeypatch):
    """A signal in the second step: the step is finished, the adapter saved, the exit code not 0."""
    import signal

    from veneer.train.language.causal_lm import CausalLM

    loss, calls, before = CausalLM.loss, [], signal.getsignal(signal.SIGINT)

    def interrupted(self, batch):
        if self.model.training:
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
        return loss(self, batch)

    monkeypatch.setattr(CausalLM, "loss", interrupted)
    said = veneer("train", recipe, "train.steps=50")
    assert said.code == 130
    folder = tmp_path / "runs/small-1"
    assert [r["step"] for r in records(folder) if "loss" in r] == [1, 2]
    assert f"interrupted after step 2; what was learned until then is in {folder / 'adapter'}" in said.out
    assert (folder / "adapter/adapter_model.safetensors").is_file()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_between_steps_keeps_what_was_learned(veneer, recipe, tmp_path, monkeypatch):
    from veneer.train.language.causal_lm import CausalLM

    evaluate = CausalLM.evaluate
    monkeypatch.setattr(
        CausalLM, "evaluate", lambda self, whole: evaluate(self, whole) if whole else {"eval_loss": float("nan")}
    )
    said = veneer("train", recipe, "train.steps=4", "eval.every_steps=2")
    assert said.code == 2
    folder = tmp_path / "runs/small-1"
    assert [r["step"] for r in records(folder) if "loss" in r] == [1, 2]
    assert "what was learned until then is in" in said.out + said.err
    assert (folder / "adapter/adapter_model.safetensors").is_file()


def test_nan_stops_the_run_with_step_rows_and_advice(veneer, recipe, tmp_path, monkeypatch):
    from veneer.train.language.causal_lm import CausalLM

    loss, calls = CausalLM.loss, []

    def broken(self, batch):
        calls.extend([1] * self.model.training)
        return loss(self, batch) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(CausalLM, "loss", broken)
    said = veneer("train", recipe)
    assert said.code == 2
    for words in ("step 3: the loss is nan", "rows.jsonl, line", "train.lr", str(tmp_path / "runs/small-1/adapter")):
        assert words in said.err
    model = AutoModelForCausalLM.from_pretrained(yaml.safe_load(recipe.read_text())["base"])
    PeftModel.from_pretrained(model, tmp_path / "runs/small-1/adapter")


def test_generate_refuses_an_adapter_for_another_base(veneer, run, tmp_path, tiny_base):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_base, hidden_size=16)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "other")
    said = veneer("generate", run, "--base", tmp_path / "other", "--prompt", "x")
    assert said.code == 2
    for words in ("does not fit this LlamaForCausalLM", "it was made for", "of another shape", "expected", "found"):
        assert words in said.err
    assert "Traceback" not in said.err


def test_the_adapter_loads_in_peft(run, tiny_base):
    import peft

    ids = torch.arange(3, 20)[None]
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), run / "adapter")(ids).logits
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), run / "adapter")(
        ids
    ).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_only_learned_tokens_reach_the_head(tiny_base):
    """The output layer sees the marked places, and gives what it would have given there."""
    from veneer.train.language.loss import only

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig())
    ids = torch.arange(3, 23).view(2, 10)
    keep = torch.rand(2, 10) > 0.5
    whole = model(ids).logits
    with only(model.get_output_embeddings(), keep):
        part = model(ids).logits
    assert part.shape == (int(keep.sum()), whole.shape[-1])
    torch.testing.assert_close(part, whole[keep])
    torch.testing.assert_close(model(ids).logits, whole)
