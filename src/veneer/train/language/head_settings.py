"""What recipes say about models with a head: classes or numbers for texts, tags for words, answers in contexts."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from veneer.core.errors import AdapterError
from veneer.train.data.settings import RowsData
from veneer.train.language.task_settings import PassTraining
from veneer.train.settings import EvalSettings, Recipe, Settings

LEAST = 4  # tokens that a question must have room for


class LabelledData(RowsData):
    """What texts and words have in common."""

    labels: list[str] | None = Field(
        None,
        min_length=2,
        description="The names of the labels, in the order of their numbers. Without it, the names of the rows in the "
        "order of the base's own head, or else of the alphabet.",
    )
    max_length: int = Field(256, ge=4, description="The most tokens that a row may have; a longer one's end goes.")


class SequenceData(LabelledData):
    """The `data` part for sequence-classification."""

    columns: ClassVar = ("text", "pair", "label")

    text: str | None = Field(
        None, description="The column of the text. Without it: text, sentence, … or the first of a known pair."
    )
    pair: str | None = Field(
        None, description="The column of a second text. Without it, and without text: hypothesis, sentence2, …"
    )
    label: str | None = Field(None, description="The column of the label. Without it: label, class, score, …")
    problem: Literal["auto", "classes", "numbers"] = Field(
        "auto", description="classes, or numbers (regression). auto: numbers where a label has a fraction."
    )


class TokenData(LabelledData):
    """The `data` part for token-classification: a row has a list of words, and a list of their tags."""

    columns: ClassVar = ("words", "tags")

    words: str | None = Field(None, description="The column of the words. Without it: tokens or words.")
    tags: str | None = Field(None, description="The column of the tags. Without it: tags, ner_tags, …")


class QuestionData(RowsData):
    """The `data` part for question-answering: the answers of a row stand in its context."""

    columns: ClassVar = ("question", "context", "answers")

    question: str = Field("question", description="The column of the question.")
    context: str = Field("context", description="The column of the text that the answer stands in.")
    answers: str = Field(
        "answers",
        description='The column of the answers: SQuAD\'s {"text": […], "answer_start": […]}, or texts alone, which are '
        "looked for. None: the context does not say.",
    )
    max_length: int = Field(
        384, ge=32, description="The most tokens of question and context together; a longer context is read in windows."
    )
    stride: int = Field(128, ge=0, description="Tokens that a window has in common with the one before.")
    longest_answer: int = Field(30, ge=1, description="The most tokens that an answer is looked for with.")
    unanswered: bool | None = Field(
        None, description="Whether a context may not say the answer (SQuAD 2); found from the rows, if not said."
    )

    @model_validator(mode="after")
    def _has_room(self) -> "QuestionData":
        if self.room < LEAST:
            raise AdapterError(
                f"data.max_length={self.max_length} and data.stride={self.stride} leave no room for a question: "
                "expected a stride of at most half of max_length"
            )
        return self

    @property
    def room(self) -> int:
        """The most tokens of a question: each window still has more of the context than the stride."""
        return min(64, (self.max_length - self.stride) // 2 - 4)


class HeadEvaluation(EvalSettings):
    """The `eval` part."""

    rows: int | None = Field(
        None, ge=1, description="The most held-out rows that figures are measured on, evenly spread; all, if not said."
    )
    judge: Literal[
        "auto", "loss", "accuracy", "f1", "matthews", "pearson", "spearman", "precision", "recall", "exact_match"
    ] = Field(
        "auto",
        description="The figure that says which of two adapters is better. auto: accuracy of classes, pearson of "
        "numbers, f1 of entities and answers.",
    )


class HeadSample(Settings):
    """The `sample` part."""

    count: int = Field(3, ge=0, description="How many held-out rows are shown with what the model says of them.")
    every_steps: int | None = Field(
        None, ge=1, description="Write them into samples/ of the run every so many steps too, and not at the end alone."
    )


class HeadRecipe(Recipe):
    """What the recipes of these tasks share."""

    eval: HeadEvaluation = Field(default_factory=HeadEvaluation)
    sample: HeadSample = Field(default_factory=HeadSample)
    train: PassTraining = Field(default_factory=PassTraining)


class SequenceRecipe(HeadRecipe):
    """A recipe for sequence-classification."""

    data: SequenceData


class TokenRecipe(HeadRecipe):
    """A recipe for token-classification."""

    data: TokenData


class QuestionRecipe(HeadRecipe):
    """A recipe for question-answering."""

    data: QuestionData
