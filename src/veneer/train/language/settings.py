"""What a recipe says about the data of a language model."""

from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import Literal

from pydantic import Field, field_validator, model_validator

from veneer.core.errors import AdapterError
from veneer.train.settings import EvalSettings, Settings, TrainSettings

Shape = Literal["text", "prompt-completion", "messages", "alpaca"]


class RowsData(Settings):
    """What the `data` part of every recipe on text says: where the rows are, and which of them are held out."""

    path: str = Field(
        min_length=1,
        description="The rows to learn from: a .jsonl, .json, .csv, .tsv or .parquet file, or a dataset of "
        "the Hugging Face hub as owner/name.",
    )
    eval_path: str | None = Field(
        None,
        min_length=1,
        description="The held-out rows, as a file or a hub dataset. Without it, and without eval_split, "
        "eval_share of the rows is kept aside.",
    )
    subset: str | None = Field(None, description="Which part of a hub dataset that has several: sst2 of nyu-mll/glue.")
    split: str = Field("train", description="Which split of a hub dataset is learned from. A file has none.")
    eval_split: str | None = Field(
        None, description="Which split of a hub dataset (eval_path, or else path) is held out."
    )
    eval_share: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="The share of the rows that is kept aside when no held-out rows are named; 0 keeps none. "
        "Rows with the same prompt, or the same text, stay together.",
    )

    @field_validator("path", "eval_path")
    @classmethod
    def _named_in_full(cls, path: str | None) -> str | None:
        """A file is named in full, so that the recipe of a run can be run again from anywhere."""
        file = Path(path or "").expanduser()
        return str(file.resolve()) if file.is_file() else path


class LanguageData(RowsData):
    """The `data` part of a recipe for a language model: where the rows are, and how they are read."""

    shape: Literal["auto", Shape] = Field(
        "auto",
        description="How a row is read: text, prompt-completion, messages (a chat) or alpaca. auto finds it "
        "from the names of the columns.",
    )
    prompt: str | None = Field(
        None,
        description="The prompt, written with the row's own columns: 'Facts: {facts}\\nSentence:'. A literal "
        "brace is doubled. With completion, it makes any table one of prompts and completions.",
    )
    completion: str | None = Field(
        None,
        description="What follows the prompt, written in the same way: ' {sentence}'. Nothing is put between "
        "the two, so a space or a new line between them is written in one of them.",
    )
    chat: bool = Field(
        False,
        description="Put prompt-completion and alpaca rows through the tokenizer's chat template, as one user "
        "turn and one assistant turn.",
    )
    learn: Literal["completions", "all"] = Field(
        "completions",
        description="Which tokens the loss counts: completions (in a chat: the assistant's turns) or all. "
        "Rows of the shape text are learned whole either way.",
    )
    max_length: int = Field(1024, ge=2, description="The most tokens that a row may have.")
    too_long: Literal["cut", "drop", "error"] = Field(
        "cut",
        description="What happens to a longer row. cut: its end goes; if nothing to learn would be left, the "
        "start of a plain prompt goes instead, and a chat is dropped. drop: the row goes. error: the run stops.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> "LanguageData":
        """Refuses settings that contradict each other."""
        if (self.prompt is None) != (self.completion is None):
            given, lacking = ("prompt", "completion") if self.completion is None else ("completion", "prompt")
            raise AdapterError(f"data.{given} is set and data.{lacking} is not: set both, or neither")
        for template in (self.prompt, self.completion):
            template_parts(template or "")
        if self.prompt is not None and self.shape not in ("auto", "prompt-completion"):
            raise AdapterError(
                f"data.prompt and data.completion make prompt-completion rows, and data.shape is {self.shape!r}: "
                "leave one of the two out"
            )
        if self.chat and self.shape == "text":
            raise AdapterError("data.chat needs a prompt and a completion; rows of the shape 'text' have none")
        return self


@lru_cache(maxsize=16)
def template_parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """The template as pairs of a text and the column that follows it (None: no column follows)."""
    advice = "expected the names of columns in braces; a literal brace is doubled"
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise AdapterError(f"the template {template!r}: {error}; {advice}") from error
    for _, column, form, conversion in parts:
        if column == "" or form or conversion:
            raise AdapterError(f"the template {template!r} holds more or less than names; {advice}")
    return tuple((text, column) for text, column, _, _ in parts)


class LanguageEvaluation(EvalSettings):
    """The `eval` part of a recipe for a language model."""

    rows: int = Field(500, ge=1, description="The most held-out rows that the loss is measured on, evenly spread.")
    answers: int = Field(
        0,
        ge=0,
        description="So many different held-out prompts are answered (greedily) before and after the training and "
        "scored with BLEU against every completion of the same prompt; 0 for none.",
    )
    max_new_tokens: int = Field(64, ge=1, description="The longest answer, in tokens.")


class LanguageSample(Settings):
    """The `sample` part of a recipe for a language model."""

    prompts: list[str] | None = Field(
        None, description="Prompts that base and adapted model answer at the end; held-out ones, if not given."
    )
    count: int = Field(3, ge=0, description="How many held-out prompts are answered.")
    every_steps: int | None = Field(
        None, ge=1, description="Answer them every so many steps too, into samples/ of the run."
    )
    max_new_tokens: int = Field(64, ge=1, description="The longest answer, in tokens.")


class LanguageTraining(TrainSettings):
    """The `train` part of a recipe for a language model."""

    packing: bool = Field(
        True,
        description="Lay rows end to end, so that no padding goes through the model; each sees only itself. A model "
        "that cannot be packed, which is found by trying, gets rows of like length, padded.",
    )
    pass_tokens: int | None = Field(
        None,
        ge=1,
        description="The most tokens that go through the model at once: a batch that has more takes several passes, "
        "with the same gradient and less memory. Chosen by the device and the dtype, if not said.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="The share of a token's probability that is spread over the whole vocabulary."
    )
