"""The estimate of memory is held against what real runs then take, in processes of their own."""

import re
import subprocess
import sys

import pytest

UNITS = {"GB": 1e9, "MB": 1e6}


def said(code: int, *arguments: object) -> str:
    call = "import sys; sys.argv[0] = 'veneer'; from veneer.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", call, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout


def bytes_after(words: str, text: str) -> float:
    number, unit = re.search(rf"{words}\s+([\d.]+) (GB|MB)", text).groups()
    return float(number) * UNITS[unit]


@pytest.fixture(scope="session")
def small_base(tiny_base, tmp_path_factory):
    """A Llama of 8 wider layers, whose activations weigh more than the interpreter."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("bases") / "small"
    wider = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "max_position_embeddings": 1024}
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_base, **wider)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings", [("dtype=float32", "adapter.lora_dropout=0.1"), ("dtype=bfloat16", "train.gradient_checkpointing=true")]
)
def test_the_estimate_is_within_a_fifth_of_what_comes(recipe, small_base, tmp_path, settings):
    rows = tmp_path / "long.jsonl"
    rows.write_text("".join('{"text": "%s"}\n' % ("The Inn is a pub. " * (12 + i % 4)) for i in range(64)))
    common = ("train", recipe, f"base={small_base}", f"data.path={rows}", "train.steps=3", "train.batch_size=16",
              "eval.rows=8", "eval.answers=0", "sample.count=0", *settings)  # fmt: skip
    told = bytes_after("memory, about:", said(0, *common, "--dry-run"))
    came = bytes_after("peak memory", said(0, *common))
    assert told == pytest.approx(came, rel=0.2)
