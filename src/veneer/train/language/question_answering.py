"""The task `question-answering`: where in a context the answer to a question stands. Long contexts are read in windows
that share `data.stride` tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.core.errors import AdapterError
from veneer.train.data.rows import Row, Rows, column
from veneer.train.language import metrics
from veneer.train.language.head_settings import LEAST, QuestionRecipe
from veneer.train.language.head_task import HeadTask
from veneer.train.language.labelled import Encoded, Labelled, Part, columns_of, records, text_of
from veneer.train.store import Columns
from veneer.train.task import Batch

OUTSIDE = -1  # where a token is in the context, for one that is not


class QuestionAnswering(HeadTask):
    """-(log p(first token) + log p(last token)) / 2, summed over the windows; both are the first token of all, where
    the window has no answer.
    """

    settings: ClassVar = QuestionRecipe
    kind = "AutoModelForQuestionAnswering"
    task_type = "QUESTION_ANS"
    pipeline = "question-answering"
    asking = "predict {adapter} --question {question} --text {context}"
    fields: ClassVar[Columns] = [("input_ids", "i4"), ("segments", "i1"), ("begin", "i4"), ("end", "i4")]
    columns: ClassVar[Columns] = [("first", "i4"), ("last", "i4"), ("answers", "i4")]

    def settle_columns(self, rows: Rows, labelled: bool = True) -> None:
        data, there = self.data, columns_of(rows)
        for key in ("question", "context", *(["answers"] if labelled else [])):
            column(getattr(data, key), (), there, key, rows.source)

    def document(self, row: Row, labelled: bool = True) -> Labelled:
        question, context = text_of(row, self.data.question).strip(), text_of(row, self.data.context)
        answers = _answers(row, self.data.answers, context) if labelled else None
        return Labelled(row.place, (question, context), answers)

    def typed(self, text: str, other: str | None) -> Labelled:
        if other is None:
            raise AdapterError("the adapter answers questions: give --question too")
        return Labelled("the text", (other.strip(), text))

    def fit(self, most: int) -> None:
        super().fit(most)
        if self.data.room < LEAST:
            self.data.stride = self.data.max_length // 3
            self.reporter.say(f"data.stride is {self.data.stride}, for that")

    def settle_rows(self) -> None:
        if self.data.unanswered is None:
            self.data.unanswered = bool((self.part.examples.table["answers"] == 0).any())

    def encode(self, batch: Sequence[Labelled]) -> Iterable[tuple[int, Encoded]]:
        found = self.tokenizer(
            self._cut([document.texts[0] for document in batch]),
            [document.texts[1] for document in batch],
            truncation="only_second",
            max_length=self.data.max_length,
            stride=self.data.stride,
            return_overflowing_tokens=True,
            return_token_type_ids=True,
            verbose=False,
        )
        for i, (number, encoding) in enumerate(zip(found["overflow_to_sample_mapping"], found.encodings, strict=True)):
            inside = [segment == 1 for segment in encoding.sequence_ids]
            begin, end = (
                [place[k] if own else OUTSIDE for place, own in zip(encoding.offsets, inside, strict=True)]
                for k in (0, 1)
            )
            ids, segments = found["input_ids"][i], found["token_type_ids"][i]
            tokens = records(self.fields, input_ids=ids, segments=segments, begin=begin, end=end)
            answers = batch[number].label or []
            yield number, (tokens, (*_place(tokens, answers), len(answers)), False)

    def _cut(self, questions: list[str]) -> list[str]:
        """The questions, without what is too long of them."""
        room = self.data.room
        found = self.tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = found["offset_mapping"]
        return [
            question if len(own) <= room else question[: own[room - 1][1]]
            for question, own in zip(questions, offsets, strict=True)
        ]

    def inputs(self, tokens: list[Any], table: Any) -> dict[str, Tensor]:
        return {"labels": torch.from_numpy(np.stack([table["first"], table["last"]], 1).astype(np.int64))}

    def units(self, inputs: Mapping[str, Tensor]) -> int:
        return len(inputs["labels"])

    def outputs(self, batch: Batch) -> Tensor:
        said = self.model(**self.given(batch))
        logits = torch.stack([said.start_logits, said.end_logits], 1)  # (windows, 2, tokens)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch.inputs["labels"].flatten(), reduction="sum") / 2

    def reading(self, output: Tensor, part: Part, example: int) -> Any:
        """(score, first character, character behind the last) of the window's best answer, and the score of none."""
        own = part.examples[example]
        places = np.flatnonzero(own["begin"] != OUTSIDE)
        nothing = float(output[0, 0] + output[1, 0])
        if not len(places):
            return -np.inf, 0, 0, nothing, -np.inf
        first, last = (output[k, places].double() for k in (0, 1))
        scores = first[:, None] + last[None]
        allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(self.data.longest_answer - 1)
        scores = scores.masked_fill(~allowed, -torch.inf)
        i, j = divmod(int(scores.argmax()), len(places))
        begin, end = int(own["begin"][places[i]]), int(own["end"][places[j]])
        total = torch.logsumexp(torch.cat([scores.flatten(), torch.tensor([nothing]).to(scores)]), 0)
        return float(scores[i, j]), begin, end, nothing, float(total)

    def predictions(self, part: Part, readings: Mapping[int, Any]) -> list[dict[str, Any]]:
        """The best answer of all windows of each question; none, where that is likelier in every window."""
        of_each: dict[int, list[Any]] = {}
        for example in sorted(readings):
            of_each.setdefault(int(part.examples.of[example]), []).append(readings[example])
        said = []
        for number, windows in of_each.items():
            score, begin, end, _, _ = max(windows)
            none = min(window[3] for window in windows)
            total = float(np.logaddexp.reduce([window[4] for window in windows]))
            answered = score > none or not self.data.unanswered
            text = part.documents[number].texts[1][begin:end] if answered else ""
            best = score if answered else none
            said.append(
                {"answer": text, "start": begin if answered else None, "probability": float(np.exp(best - total))}
            )
        return said

    def figures(self, part: Part, documents: Sequence[int], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        answers = [[text for text, _ in part.documents[i].label] for i in documents]
        return metrics.answer_figures([own["answer"] for own in predictions], answers)

    def judges(self) -> list[str]:
        return ["f1", "exact_match"]

    def shown(self, document: Labelled, said: dict[str, Any]) -> dict[str, str]:
        true = " / ".join(dict.fromkeys(text for text, _ in document.label)) or "(not said)"
        told = f"{said['answer'] or '(not said)'} ({said['probability']:.2f})"
        return {"question": document.texts[0], "label": true, "predicted": told}

    def look(self, document: Labelled) -> list[tuple[str, bool]]:
        question, context = document.texts
        if not document.label:
            return [(f"{question} | {context}", False)]
        text, begin = document.label[0]
        end = begin + len(text)
        return [(f"{question} | {context[:begin]}", False), (text, True), (context[end:], False)]


def _answers(row: Row, name: str, context: str) -> list[tuple[str, int]]:
    """(text, its first character) of each answer. Raises `AdapterError` for one that is not in the context."""
    value: Any = row.values.get(name)
    begins: Any = None
    if isinstance(value, Mapping) and "text" in value:
        value, begins = value["text"], value.get("answer_start", value.get("start"))
    if isinstance(value, str):
        value = [value] if value else []
    texts = list(value) if value is not None else []
    begins = [None] * len(texts) if begins is None else begins if isinstance(begins, Iterable) else [begins]
    found = []
    for text, begin in zip(texts, begins, strict=False):
        if not isinstance(text, str) or not text:
            raise AdapterError(f"{row.place}: {name!r} has the answer {text!r:.80}, expected text")
        at = context.find(text) if begin is None else int(begin)
        if at < 0 or context[at : at + len(text)] != text:
            where = "" if begin is None else f" at character {begin}"
            raise AdapterError(f"{row.place}: the answer {text!r:.80} is not in the context{where}")
        found.append((text, at))
    return found


def _place(tokens: Any, answers: list[list[Any]] | None) -> tuple[int, int]:
    """The first and the last token of the first answer; 0 and 0, where the window has not all of it."""
    if not answers:
        return 0, 0
    text, begin = answers[0]
    end = begin + len(text.rstrip())
    begin += len(text) - len(text.lstrip())
    inside = np.flatnonzero((tokens["begin"] < end) & (tokens["end"] > begin) & (tokens["begin"] != OUTSIDE))
    whole = len(inside) and tokens["begin"][inside[0]] <= begin and tokens["end"][inside[-1]] >= end
    return (int(inside[0]), int(inside[-1])) if whole else (0, 0)
