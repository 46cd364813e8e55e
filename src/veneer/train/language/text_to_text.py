"""The task `text-to-text`: an encoder reads a prompt, a decoder learns to write the completion (T5, BART)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from veneer.train.language.answers import pad_of
from veneer.train.language.packing import filled, padded
from veneer.train.language.pairs import encode_pairs, encode_source, sides
from veneer.train.language.settings import PairData
from veneer.train.language.task_settings import LanguageEvaluation, LanguageSample, PairTraining
from veneer.train.language.text_task import TextTask
from veneer.train.language.tokens import Example
from veneer.train.settings import Recipe

NOTHING = -100  # where nothing is learned, as models of transformers have it


class TextToTextRecipe(Recipe):
    """A recipe for a model of an encoder and a decoder."""

    data: PairData
    eval: LanguageEvaluation = Field(default_factory=LanguageEvaluation)
    sample: LanguageSample = Field(default_factory=LanguageSample)
    train: PairTraining = Field(default_factory=PairTraining)


class TextToText(TextTask):
    """log p(token | the prompt, what stands before it in the completion), summed over the completion's tokens."""

    settings: ClassVar = TextToTextRecipe
    two_parts = True
    task_type = "SEQ_2_SEQ_LM"
    encode: ClassVar[Any] = staticmethod(encode_pairs)
    encode_prompt: ClassVar[Any] = staticmethod(encode_source)

    def settle(self, model: Any) -> None:
        pass

    def inputs(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], int]:
        prompts, completions = zip(*map(sides, examples), strict=True)
        inputs, labels = padded(prompts, pad_of(self.tokenizer)), filled(completions, NOTHING)
        keep = labels != NOTHING
        inputs["decoder_input_ids"] = self._given(labels)
        return inputs | {"keep": keep, "targets": labels[keep]}, int(keep.sum())

    def _given(self, labels: Tensor) -> Tensor:
        """What the decoder is given to say these: its start, and all but the last of them; some models do otherwise."""
        if hasattr(self.model, "prepare_decoder_input_ids_from_labels"):
            return self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        start = labels.new_full((len(labels), 1), self.model.config.decoder_start_token_id)
        given = torch.cat([start, labels[:, :-1]], 1)
        return given.masked_fill(given == NOTHING, pad_of(self.tokenizer))

    def reading(self) -> dict[str, Any]:
        return dict(self.recipe.data.model_dump(include={"shape", "prompt", "completion", "max_length"}))
