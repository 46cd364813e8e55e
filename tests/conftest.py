"""Every test runs offline, on few threads, from one seed; and tiny genuine models to adapt are a call away."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false"
)

from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools  # noqa: F401  # before distutils, which it takes the place of: torch's compiler asks for both
import torch
from torch import nn

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
}
_ENCODER = {**_SIZES, "max_position_embeddings": 40}
_FAMILIES = {
    "llama": ("CausalLM", {**_SIZES, "num_key_value_heads": 1}),
    "mistral": ("CausalLM", {**_SIZES, "num_key_value_heads": 1}),
    "qwen3": ("CausalLM", {**_SIZES, "num_key_value_heads": 1, "head_dim": 16}),
    "gpt2": ("CausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}),
    "gpt_neox": ("CausalLM", _ENCODER),
    "opt": ("CausalLM", {**_ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("CausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}),
    "bert": ("SequenceClassification", _ENCODER),
    "roberta": ("SequenceClassification", _ENCODER),
    "deberta-v2": ("SequenceClassification", _ENCODER),
    "distilbert": ("MaskedLM", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "vocab_size": 64}),
    "t5": ("Seq2SeqLM", {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 64}),
    "gemma": ("CausalLM", {**_SIZES, "num_key_value_heads": 1, "head_dim": 16}),
    "vit": ("ImageClassification", {**_SIZES, "image_size": 8, "patch_size": 4}),
}

ALONE = "PYTEST_XDIST_WORKER" not in os.environ  # else there is a process for each core
torch.set_num_threads(min(2, torch.get_num_threads()) if ALONE else 1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def bits() -> Callable[[nn.Module], dict[str, object]]:
    """Every tensor of a model to the bit (NaN and the sign of zero included), for `==`."""

    def of(tensor: torch.Tensor) -> object:
        return tensor.dtype, tensor.shape, tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return lambda model: {name: of(tensor) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """`tiny("llama")`: a genuine transformers model of that family, with random weights, in eval mode."""

    def build(family: str, head: str | None = None, **settings: object) -> nn.Module:
        import transformers

        usual, sizes = _FAMILIES[family]
        # a token outside of so small a vocabulary would be warned of
        tokens = {} if family == "vit" else {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        if family == "t5":
            tokens["decoder_start_token_id"] = 0
        config = transformers.AutoConfig.for_model(family, **{**sizes, **tokens, **settings})
        name = f"AutoModelFor{head or usual}" if head != "" else "AutoModel"
        return getattr(transformers, name).from_config(config).eval()

    return build


@pytest.fixture(scope="session")
def encoder(tiny, tmp_path_factory) -> Callable[..., Path]:
    """`encoder("bert")`: a base without a head, with a tokenizer of letters, as a folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'|-"
    words = [
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[UNK]",
        "good",
        "bad",
        "film",
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}

    def build(family: str = "bert", head: str | None = "", **settings: object) -> Path:
        folder = tmp_path_factory.mktemp("bases") / family
        typed = {} if family in ("roberta", "llama") else {"type_vocab_size": 2}
        positions = {"max_position_embeddings": 66, **typed} if family != "llama" else {}
        torch.manual_seed(0)
        tiny(family, head, vocab_size=len(words), **{**positions, **settings}).save_pretrained(folder)
        inputs = ["input_ids", *(["token_type_ids"] if typed else []), "attention_mask"]
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names).save_pretrained(folder)
        return folder

    return build


@pytest.fixture
def unet() -> nn.Module:
    """A UNet of diffusers with two levels."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.fixture(scope="session")
def expect_rows_as_alone() -> Callable[..., torch.Tensor]:
    """`expect_rows_as_alone(model, tokens, specs, beams, new)`: mixed rows give the logits, which are returned, and the
    `new` tokens that each gives alone.
    """

    def expect(model, tokens: torch.Tensor, specs: list, beams: int, new: int) -> torch.Tensor:
        together = model(tokens, adapter_names=specs).logits
        options = {"max_new_tokens": new, "num_beams": beams, "do_sample": False}
        answers = model.generate(tokens, adapter_names=specs, attention_mask=torch.ones_like(tokens), **options)
        for i, spec in enumerate(specs):
            row = tokens[i : i + 1]
            with model.using([] if spec == "__base__" else spec):
                torch.testing.assert_close(together[i], model(row).logits[0])
                single = model.generate(row, attention_mask=torch.ones_like(row), **options)[0]
            assert torch.equal(answers[i, : len(single)], single)
        return together

    return expect
