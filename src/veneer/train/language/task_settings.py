"""What recipes say about tasks on text: how they are measured, shown and learned."""

from typing import Literal

from pydantic import Field

from veneer.train.settings import EvalSettings, Settings, TrainSettings


class LossEvaluation(EvalSettings):
    """The `eval` part where held-out rows are measured by a loss."""

    rows: int = Field(500, ge=1, description="The most held-out rows that the loss is measured on, evenly spread.")


class LanguageEvaluation(LossEvaluation):
    """The `eval` part of a recipe for a language model."""

    answers: int = Field(
        0,
        ge=0,
        description="So many different held-out prompts are answered before and after the training and compared with "
        "every completion of the same prompt; 0 for none.",
    )
    figures: list[Literal["bleu", "rouge_l", "chrf", "exact_match"]] = Field(
        ["bleu", "rouge_l", "chrf", "exact_match"],
        description="What the answers are measured by: bleu, rouge_l and chrf of 100, exact_match as a share.",
    )
    beams: int = Field(1, ge=1, description="Answers that are followed at once; 1 takes the likeliest token each time.")
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


class PassTraining(TrainSettings):
    """The `train` part where a batch may take several passes."""

    pass_tokens: int | None = Field(
        None,
        ge=1,
        description="The most tokens, padding included, that go through the model at once: a batch that has more takes "
        "several passes, with the same gradient and less memory. Chosen by the device and the dtype, if not said.",
    )


class PairTraining(PassTraining):
    """The `train` part for text-to-text."""

    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="The share of a token's probability that is spread over the whole vocabulary."
    )


class PackedTraining(PassTraining):
    """The `train` part where rows may be packed."""

    packing: bool = Field(
        True,
        description="Lay rows end to end, so that no padding goes through the model; each sees only itself. A model "
        "that cannot be packed, which is found by trying, gets rows of like length, padded.",
    )


class LanguageTraining(PackedTraining, PairTraining):
    """The `train` part of a recipe for a language model."""


class PreferenceTraining(PackedTraining):
    """The `train` part for preference."""

    lr: float = Field(2e-5, gt=0, le=10, description="The highest learning rate.")
    beta: float = Field(
        0.1, gt=0, description="How strongly a model that goes away from the base is held back: less for smaller ones."
    )
    loss: Literal["dpo", "ipo"] = Field(
        "dpo", description="dpo: -log σ(margin). ipo: (margin / beta - 1 / (2 beta))², which does not saturate."
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="The share of the rows whose preference is taken to be the wrong way round (cDPO).",
    )
