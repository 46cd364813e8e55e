"""The task `causal-lm`: a decoder learns to continue text."""

from typing import ClassVar

from pydantic import Field

from veneer.train.language.settings import LanguageData
from veneer.train.language.task_settings import LanguageEvaluation, LanguageSample, LanguageTraining
from veneer.train.language.text_task import TextTask
from veneer.train.settings import Recipe


class CausalLMRecipe(Recipe):
    """A recipe for a causal language model."""

    data: LanguageData
    eval: LanguageEvaluation = Field(default_factory=LanguageEvaluation)
    sample: LanguageSample = Field(default_factory=LanguageSample)
    train: LanguageTraining = Field(default_factory=LanguageTraining)


class CausalLM(TextTask):
    """log p(token | what stands before it), summed over the learned tokens."""

    settings: ClassVar = CausalLMRecipe
