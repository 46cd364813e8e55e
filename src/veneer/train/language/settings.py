"""What recipes say about rows of text."""

from functools import lru_cache
from string import Formatter
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from veneer.core.errors import AdapterError
from veneer.train.data.settings import RowsData

Shape = Literal["text", "prompt-completion", "messages", "alpaca"]


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
    learn: Literal["completions", "last", "all"] = Field(
        "completions",
        description="Which tokens the loss counts: completions (in a chat: all of the assistant's turns), last (in a "
        "chat: the last of them, and what comes behind it goes) or all. Rows of the shape text are learned whole.",
    )
    max_length: int = Field(1024, ge=2, description="The most tokens that a row may have.")
    too_long: Literal["cut", "drop", "error"] = Field(
        "cut",
        description="What happens to a longer row. cut: its end goes; if nothing to learn would be left, the "
        "start of a plain prompt goes instead, and a chat is dropped. drop: the row goes. error: the run stops.",
    )

    @property
    def limit(self) -> str:
        """How long a row may be, for messages."""
        return f"data.max_length={self.max_length}"

    @model_validator(mode="after")
    def _agrees(self) -> "LanguageData":
        """Refuses settings that contradict each other."""
        _agree(self, ("prompt", "completion"))
        if self.chat and self.shape == "text":
            raise AdapterError("data.chat needs a prompt and a completion; rows of the shape 'text' have none")
        return self


class PairData(RowsData):
    """The `data` part of a recipe for text-to-text: an encoder reads the prompt, a decoder writes the completion."""

    chat: ClassVar[bool] = False
    learn: ClassVar[str] = "completions"

    shape: Literal["auto", "prompt-completion", "alpaca"] = Field(
        "auto", description="What a row is. auto: found by the columns."
    )
    prompt: str | None = Field(
        None,
        description="What the encoder reads, written with the row's own columns: 'summarize: {article}'. A literal "
        "brace is doubled. With completion, it makes any table one of prompts and completions.",
    )
    completion: str | None = Field(None, description="What the decoder learns to write, in the same way: '{summary}'.")
    max_length: int = Field(1024, ge=2, description="The most tokens of a prompt.")
    max_completion: int = Field(256, ge=2, description="The most tokens of a completion.")
    too_long: Literal["cut", "drop", "error"] = Field(
        "cut",
        description="What happens to a longer row. cut: the end of what is too long goes. drop: the row goes. error: "
        "the run stops.",
    )

    @property
    def limit(self) -> str:
        """How long a row may be, for messages."""
        return f"data.max_length={self.max_length} or data.max_completion={self.max_completion}"

    @model_validator(mode="after")
    def _agrees(self) -> "PairData":
        _agree(self, ("prompt", "completion"))
        return self


class PreferenceData(RowsData):
    """The `data` part of a recipe for preference: a row has a prompt, a chosen and a rejected completion of it."""

    learn: ClassVar[str] = "completions"

    shape: Literal["auto", "prompt-completion", "messages"] = Field(
        "auto",
        description="prompt-completion: chosen and rejected are texts, as the prompt is. messages: they are lists of "
        "messages, which begin with those of the prompt, or follow them. auto: found by the first rows.",
    )
    prompt: str | None = Field(
        None,
        description="The prompt, written with the row's own columns: 'Q: {question}\\nA:'. A literal brace is doubled. "
        "With chosen and rejected, it makes any table one of preferences.",
    )
    chosen: str | None = Field(None, description="The better completion, written in the same way: ' {better}'.")
    rejected: str | None = Field(None, description="The worse one: ' {worse}'.")
    chat: bool = Field(
        False,
        description="Put rows of texts through the tokenizer's chat template, as one user turn and one assistant turn.",
    )
    max_length: int = Field(1024, ge=2, description="The most tokens of a prompt with one of its completions.")
    too_long: Literal["cut", "drop", "error"] = Field(
        "cut",
        description="What happens to a longer row. cut: the completion's end goes; where nothing of one would be left, "
        "the row goes. drop: the row goes. error: the run stops.",
    )

    @property
    def limit(self) -> str:
        """How long a row may be, for messages."""
        return f"data.max_length={self.max_length}"

    @model_validator(mode="after")
    def _agrees(self) -> "PreferenceData":
        _agree(self, ("prompt", "chosen", "rejected"))
        return self


PairsData = LanguageData | PairData
TextData = LanguageData | PairData | PreferenceData


def _agree(settings: TextData, names: tuple[str, ...]) -> None:
    """Raises `AdapterError` where one template is set and another is not, or the shape says otherwise."""
    templates = {name: getattr(settings, name) for name in names}
    said = [name for name, template in templates.items() if template is not None]
    if lacking := [name for name in names if name not in said]:
        if said:
            asked = "both, or neither" if len(names) == 2 else "all of them, or none"
            raise AdapterError(f"data.{said[0]} is set and data.{lacking[0]} is not: set {asked}")
        return
    for template in templates.values():
        template_parts(template)
    if settings.shape not in ("auto", "prompt-completion"):
        told = " and ".join(f"data.{name}" for name in names)
        raise AdapterError(
            f"{told} make prompt-completion rows, and data.shape is {settings.shape!r}: leave one of the two out"
        )


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
