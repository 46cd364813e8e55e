"""An adapted language model from its folders: to be asked, or to be merged."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TextStreamer

from veneer import files, library, zoo
from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError, listed
from veneer.files.pipeline import merged
from veneer.safe.whole import write_folder
from veneer.train.bases.loading import choose_device, choose_dtype, load_language_model, load_tokenizer, quiet
from veneer.train.data.rows import read_rows
from veneer.train.language.answers import answer, pad_of, refuse_empty, stops_of
from veneer.train.language.pairs import encode_source
from veneer.train.language.settings import LanguageData, PairData, PairsData
from veneer.train.language.shapes import detect_shape, documents, opening, without_completions
from veneer.train.language.tokens import encode_prompt
from veneer.train.language.turns import Chat
from veneer.train.record import USAGE
from veneer.train.trained import base_with_head, head_task

Opening = str | Chat
D = TypeVar("D", bound=LanguageData | PairData)


@dataclass
class Speaker:
    """A base, an adapter on it, and how prompts are written for it."""

    model: Any
    tokenizer: Any
    data: PairsData

    @classmethod
    def load(cls, adapter: str, base: str | None = None, dtype: str | None = "auto", device: str = "auto") -> "Speaker":
        """From a run, an adapter of any format, or a name of the library; the base is the one that the adapter names,
        or `base`. `dtype` None is the one that the base is stored in.
        """
        path = library.find(adapter)
        if head_task(path):
            raise AdapterError(f"{path} is for a model with a head, which answers nothing: use `veneer predict`")
        held = files.read(path)
        if held.parts:
            parts = listed(held.parts, say=str)
            raise AdapterError(f"{path} is for a pipeline's {parts}, and not for a language model, which answers")
        base = base or held.config.base_model_name_or_path
        if not base:
            raise AdapterError(f"{path} does not say which base it is for: give --base")
        place = zoo.resolve(base)
        chosen = choose_device(device)
        model = load_language_model(place, dtype and choose_dtype(dtype, chosen), chosen)
        data = _usage(path, PairData if model.config.is_encoder_decoder else LanguageData)
        return cls(files.attach(model, held).eval(), load_tokenizer(place), data)

    def opening(self, text: str) -> Opening:
        """What a person types, as the rows of the training write it."""
        return opening(text, self.data)

    def read(self, file: Path) -> list[Opening]:
        """The prompts of a file, whose rows have the columns that the training's had; completions may be missing."""
        rows = without_completions(read_rows(str(file)), self.data)
        return [document.opening for _, document in documents(rows, detect_shape(rows, self.data), self.data)]

    def tokens(self, prompt: Opening) -> list[int]:
        """What the model is given for a prompt."""
        if isinstance(self.data, PairData):
            return encode_source(prompt, self.tokenizer, self.data)
        return encode_prompt(prompt, self.tokenizer, self.data)

    def answers(
        self,
        prompts: Sequence[Opening],
        adapted: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
        **options: Any,
    ) -> list[str]:
        """The answer to each prompt, of the adapted model or of the base."""
        ids = [self.tokens(prompt) for prompt in prompts]
        with nullcontext() if adapted else self.model.disable_adapter():
            return answer(self.model, self.tokenizer, ids, progress=progress, **options)

    def stream(self, prompt: Opening, **options: Any) -> None:
        """Print the answer to one prompt as it comes."""
        tokens = [self.tokens(prompt)]
        refuse_empty(tokens)
        ids = torch.tensor(tokens, device=self.model.device)
        streamer = _Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad():
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=streamer,
                pad_token_id=pad_of(self.tokenizer),
                eos_token_id=stops_of(self.model, self.tokenizer),
                **{"do_sample": False, "num_beams": 1, **options},
            )


class _Streamer(TextStreamer):
    """Prints an answer as it comes, without the blanks that it begins with."""

    begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        super().on_finalized_text(text, stream_end)


def write_merged(
    place: Path,
    adapters: Sequence[tuple[Adapter, float]],
    out: Path,
    dtype: str | None = None,
    path: Path | None = None,
) -> None:
    """The base in `place` as W + Σ weight · ΔW: an ordinary transformers folder, with its tokenizer or image processor,
    whole or not at all. `dtype` None is the one that the base is stored in; the `path` of an adapter says whether it
    has a head. Raises `AdapterError`, or `OSError`.
    """
    cpu = choose_device("cpu")
    dtype = dtype and choose_dtype(dtype, cpu)
    headed = base_with_head(path, place, dtype, cpu) if path else None
    model = headed.model if headed else load_language_model(place, dtype, cpu)
    model = merged(model, adapters)
    reader = getattr(headed, "processor", None) or load_tokenizer(place)

    def fill(folder: Path) -> None:
        with quiet():
            model.save_pretrained(folder)
        reader.save_pretrained(folder)

    write_folder(out, fill)


def _usage(adapter: Path, kind: type[D]) -> D:
    """How prompts are written for the adapter; plainly, where it does not say."""
    path = adapter / USAGE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["data"] if path.is_file() else {}
        return kind(path="-", **data)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: {error}; without it, prompts are taken as they are") from error
