"""The task `sequence-classification`: a class, or a number, for a text or a pair of texts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.core.errors import AdapterError
from veneer.train.bases.heads import load_config
from veneer.train.data.labels import numbered_names, numbers_of, written
from veneer.train.data.rows import Row, Rows, column
from veneer.train.language import metrics
from veneer.train.language.head_settings import SequenceRecipe
from veneer.train.language.head_task import HeadTask
from veneer.train.language.labelled import (
    Encoded,
    Examples,
    Labelled,
    Part,
    columns_of,
    is_number,
    label_counts,
    records,
    text_of,
)
from veneer.train.language.sources import Documents
from veneer.train.store import Columns
from veneer.train.task import Batch

PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)
TEXTS = ("text", "sentence", "content", "review")
LABELS = ("label", "labels", "class", "category", "score", "stars", "sentiment")
MANY = 20  # rows, from which on labels that mostly differ are no classes


class SequenceClassification(HeadTask):
    """-log p(class | text), or (number - said)², summed over the rows."""

    settings: ClassVar = SequenceRecipe
    kind = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"
    pipeline = "text-classification"
    asking = "predict {adapter} --text {text}"
    fields: ClassVar[Columns] = [("input_ids", "i4"), ("segments", "i1")]
    columns: ClassVar[Columns] = [("label", "f8")]

    @property
    def numeric(self) -> bool:
        """Whether numbers are learned, and not classes."""
        return self.data.problem == "numbers"

    def settle_columns(self, rows: Rows, labelled: bool = True) -> None:
        data, there = self.data, columns_of(rows)
        if data.text is None:
            pair = next((own for own in PAIRS if set(own) <= set(there)), None)
            data.text, data.pair = pair or (column(None, TEXTS, there, "text", rows.source), data.pair)
        if data.pair is not None:
            self.asking = "predict {adapter} --text {text} --pair {pair}"
        for key in ("text", "pair"):
            if (named := getattr(data, key)) is not None:
                column(named, (), there, key, rows.source)
        if labelled:
            data.label = column(data.label, LABELS, there, "label", rows.source)

    def document(self, row: Row, labelled: bool = True) -> Labelled:
        texts = [text_of(row, name) for name in (self.data.text, self.data.pair) if name is not None]
        label = row.values.get(self.data.label) if labelled else None
        if labelled and (not isinstance(label, str | int | float) or label != label or label == ""):
            raise AdapterError(f"{row.place}: {self.data.label!r} is {label!r:.80}, expected a name or a number")
        if labelled and self.numeric and not is_number(written(label)):
            raise AdapterError(f"{row.place}: {self.data.label!r} is {label!r:.80}, expected a number (data.problem)")
        return Labelled(row.place, tuple(texts), label)

    def settle_labels(self, learned: Documents[Labelled], held_out: Documents[Labelled]) -> None:
        data, counts = self.data, label_counts(learned, self.reporter)
        numeric = all(map(is_number, set(counts) - {"*"}))
        if data.problem == "auto":
            fraction = any(not name.removeprefix("-").isdigit() for name in counts)
            data.problem = "numbers" if numeric and fraction and not data.labels else "classes"
        if self.numeric:
            return
        rows = sum(counts.values())
        if "*" in counts or (not data.labels and len(counts) > rows / 2 and rows >= MANY):
            raise AdapterError(
                f"data.label={data.label}: {len(counts):,} different labels in {rows:,} rows are no classes; name "
                "another column, or say data.problem=numbers"
            )
        own = load_config(self.folder).id2label or {}
        data.labels = numbered_names(counts, data.labels, own)
        if len(data.labels) < 2:
            raise AdapterError(f"data.label={data.label}: all rows have the label {data.labels[0]!r}: nothing to learn")
        if held_out:
            numbers_of(data.labels, label_counts(held_out, self.reporter))

    def config(self) -> dict[str, Any]:
        if self.numeric:
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(self.data.labels))
        back = {name: number for number, name in names.items()}
        return {"id2label": names, "label2id": back, "problem_type": "single_label_classification"}

    def typed(self, text: str, other: str | None) -> Labelled:
        if (other is None) != (self.data.pair is None):
            wanted = "one text" if self.data.pair is None else "a pair of texts: give --pair too"
            raise AdapterError(f"the adapter was trained on {wanted}")
        return Labelled("the text", (text,) if other is None else (text, other))

    def encode(self, batch: Sequence[Labelled]) -> Iterable[tuple[int, Encoded]]:
        texts = [list(texts) for texts in zip(*(document.texts for document in batch), strict=True)]
        found = self.tokenizer(
            *texts, truncation=True, max_length=self.data.max_length, return_token_type_ids=True, verbose=False
        )
        labels = self._numbers([document.label for document in batch])
        for i, encoding in enumerate(found.encodings):
            tokens = records(self.fields, input_ids=found["input_ids"][i], segments=found["token_type_ids"][i])
            yield i, (tokens, (labels[i],), bool(encoding.overflowing))

    def _numbers(self, labels: Sequence[Any]) -> list[float]:
        if self.numeric:
            return [float("nan") if label is None else float(label) for label in labels]
        known = numbers_of(self.data.labels, {written(label) for label in labels if label is not None})
        return [float("nan") if label is None else known[written(label)] for label in labels]

    def inputs(self, tokens: list[Any], table: Any) -> dict[str, Tensor]:
        labels = torch.tensor(table["label"].tolist())
        return {"labels": labels if self.numeric else labels.nan_to_num(0).long()}

    def units(self, inputs: Mapping[str, Tensor]) -> int:
        return len(inputs["labels"])

    def outputs(self, batch: Batch) -> Tensor:
        logits = self.model(**self.given(batch)).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # (rows, classes)

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels = batch.inputs["labels"]
        if self.numeric:
            return F.mse_loss(outputs.squeeze(1), labels.to(outputs.dtype), reduction="sum")
        return F.cross_entropy(outputs, labels, reduction="sum")

    def reading(self, output: Tensor, part: Part, example: int) -> Any:
        return (output if self.numeric else output.softmax(-1)).tolist()

    def predictions(self, part: Part, readings: Mapping[int, Any]) -> list[dict[str, Any]]:
        said = [readings[example] for example in sorted(readings)]
        if self.numeric:
            return [{"label": own[0]} for own in said]
        names, best = self.data.labels, [max(range(len(own)), key=own.__getitem__) for own in said]
        return [{"label": names[i], "probability": own[i]} for own, i in zip(said, best, strict=True)]

    def figures(self, part: Part, documents: Sequence[int], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        true = part.examples.table["label"][part.of_documents(documents)]
        if self.numeric:
            said = np.array([own["label"] for own in predictions])
            return {"pearson": metrics.pearson(said, true), "spearman": metrics.spearman(said, true)}
        known = {name: number for number, name in enumerate(self.data.labels)}
        said = np.array([known[own["label"]] for own in predictions])
        return metrics.classification(said, true.astype(int), len(known))

    def judges(self) -> list[str]:
        return ["pearson", "spearman"] if self.numeric else ["accuracy", "f1", "matthews"]

    def label_shares(self, examples: Examples) -> dict[str, int]:
        if self.numeric:
            return {}
        counts = np.bincount(examples.table["label"].astype(int), minlength=len(self.data.labels))
        return dict(zip(self.data.labels, counts.tolist(), strict=True))

    def _name(self, label: Any) -> str:
        if self.numeric:
            return f"{float(label):.3g}"
        return str(self.data.labels[int(self._numbers([label])[0])])

    def shown(self, document: Labelled, said: dict[str, Any]) -> dict[str, str]:
        texts = dict(zip(("text", "pair"), document.texts, strict=False))
        told = f"{said['label']:.3g}" if self.numeric else f"{said['label']} ({said['probability']:.2f})"
        return {**texts, "label": self._name(document.label), "predicted": told}

    def look(self, document: Labelled) -> list[tuple[str, bool]]:
        return [(" | ".join(document.texts) + " → ", False), (self._name(document.label), True)]
