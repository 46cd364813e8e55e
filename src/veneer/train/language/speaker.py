"""An adapted language model from its folders: to be asked, or to be merged."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from veneer import zoo
from veneer.core.adapter import read_config
from veneer.core.errors import AdapterError, nearest
from veneer.core.model import PeftModel
from veneer.train.language.answers import answer, pad_of, refuse_empty, stops_of
from veneer.train.language.chat import Message
from veneer.train.language.model import choose_device, choose_dtype, load_causal_lm, load_tokenizer, quiet
from veneer.train.language.rows import read_rows
from veneer.train.language.settings import LanguageData
from veneer.train.language.shapes import detect_shape, documents, opening, without_completions
from veneer.train.language.tokens import encode_prompt
from veneer.train.record import USAGE

Opening = str | list[Message]


@dataclass
class Speaker:
    """A base, an adapter on it, and how prompts are written for it."""

    model: Any
    tokenizer: Any
    data: LanguageData

    @classmethod
    def load(cls, adapter: str, base: str | None = None, dtype: str | None = "auto", device: str = "auto") -> "Speaker":
        """From a run's or an adapter's folder; the base is the one that the adapter names, or `base`.

        `dtype` None is the one that the base is stored in.
        """
        folder = adapter_folder(adapter)
        named = read_config(folder).base_model_name_or_path
        if not (base or named):
            raise AdapterError(f"{folder} does not say which base it is for: give --base")
        place = zoo.resolve(base or named or "")
        chosen = choose_device(device)
        model = load_causal_lm(place, dtype and choose_dtype(dtype, chosen), chosen)
        model = PeftModel.from_pretrained(model, folder)
        return cls(model.eval(), load_tokenizer(place), _usage(folder))

    def opening(self, text: str) -> Opening:
        """What a person types, as the rows of the training write it."""
        return opening(text, self.data)

    def read(self, file: Path) -> list[Opening]:
        """The prompts of a file, whose rows have the columns that the training's had; completions may be missing."""
        rows = without_completions(read_rows(str(file)), self.data)
        return [document.opening for _, document in documents(rows, detect_shape(rows, self.data), self.data)]

    def answers(
        self,
        prompts: Sequence[Opening],
        adapted: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
        **options: Any,
    ) -> list[str]:
        """The answer to each prompt, of the adapted model or of the base."""
        ids = [encode_prompt(prompt, self.tokenizer, self.data) for prompt in prompts]
        with nullcontext() if adapted else self.model.disable_adapter():
            return answer(self.model, self.tokenizer, ids, progress=progress, **options)

    def stream(self, prompt: Opening, **options: Any) -> None:
        """Print the answer to one prompt as it comes."""
        tokens = [encode_prompt(prompt, self.tokenizer, self.data)]
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
                **{"do_sample": False, **options},
            )


class _Streamer(TextStreamer):
    """Prints an answer as it comes, without the blanks that it begins with."""

    begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        super().on_finalized_text(text, stream_end)


def adapter_folder(name: str) -> Path:
    """The adapter's folder: that of a run, or the folder itself."""
    folder = Path(name).expanduser()
    if (folder / "adapter" / "adapter_config.json").is_file():
        return folder / "adapter"
    if (folder / "adapter_config.json").is_file():
        return folder
    if folder.is_dir():
        raise AdapterError(f"{folder} is neither a run nor an adapter: it has no adapter/ and no adapter_config.json")
    siblings = [str(path) for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
    raise AdapterError(f"{folder}: there is no such run or adapter{nearest(str(folder), siblings)}")


def write_merged(adapter: str, out: Path, base: str | None, dtype: str | None) -> Path:
    """Merge and write an ordinary transformers folder, tokenizer included, whole or not at all."""
    if out.exists():
        raise AdapterError(f"{out} exists already; nothing was written")
    speaker = Speaker.load(adapter, base, dtype, "cpu")
    model = speaker.model.merge_and_unload()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            with quiet():
                model.save_pretrained(workspace / "model")
            speaker.tokenizer.save_pretrained(workspace / "model")
            for path in (workspace / "model").glob("*.safetensors"):
                shutil.copymode(workspace / "model/config.json", path)  # else only their owner could read them
            os.replace(workspace / "model", out)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
    except OSError as error:
        raise AdapterError(f"{out} cannot be written: {error.strerror or error}") from error
    return out


def _usage(folder: Path) -> LanguageData:
    """How prompts are written for the adapter; plainly, where it does not say."""
    path = folder / USAGE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["data"] if path.is_file() else {}
        return LanguageData(path="-", **data)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: {error}; without it, prompts are taken as they are") from error
