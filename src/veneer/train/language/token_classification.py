"""The task `token-classification`: a tag for each word; the first token of a word says it."""

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
from veneer.train.language.head_settings import TokenRecipe
from veneer.train.language.head_task import HeadTask
from veneer.train.language.labelled import Encoded, Examples, Labelled, Part, columns_of, label_counts, records
from veneer.train.language.packing import filled
from veneer.train.language.sources import Documents
from veneer.train.store import Columns
from veneer.train.task import Batch

WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels", "pos_tags", "upos")
NOTHING = -100  # what a token that begins no word is to learn
MOST_TAGS = 2**15
UNKNOWN = -1  # a word whose tag nobody said


class TokenClassification(HeadTask):
    """-log p(tag | words), summed over the words."""

    settings: ClassVar = TokenRecipe
    kind = "AutoModelForTokenClassification"
    task_type = "TOKEN_CLS"
    pipeline = "token-classification"
    asking = "predict {adapter} --text {words}"
    fields: ClassVar[Columns] = [("input_ids", "i4"), ("segments", "i1"), ("tag", "i2"), ("word", "i4")]
    columns: ClassVar[Columns] = [("words", "i4")]

    def settle_columns(self, rows: Rows, labelled: bool = True) -> None:
        data, there = self.data, columns_of(rows)
        data.words = column(data.words, WORDS, there, "words", rows.source)
        if labelled:
            data.tags = column(data.tags, TAGS, there, "tags", rows.source)

    def document(self, row: Row, labelled: bool = True) -> Labelled:
        words = _list(row.values.get(self.data.words), str)
        if not words:
            raise AdapterError(f"{row.place}: expected a list of words in {self.data.words!r}")
        tags = _list(row.values.get(self.data.tags), str | int) if labelled else None
        if labelled and (tags is None or len(tags) != len(words)):
            found = "no list of tags" if tags is None else f"{len(tags)} tags"
            raise AdapterError(
                f"{row.place}: expected {len(words)} tags in {self.data.tags!r}, one a word; found {found}"
            )
        return Labelled(row.place, tuple(words), tags)

    def settle_labels(self, learned: Documents[Labelled], held_out: Documents[Labelled]) -> None:
        counts = label_counts(learned, self.reporter)
        if len(counts) < 2 or len(counts) > MOST_TAGS:
            raise AdapterError(
                f"data.tags={self.data.tags}: expected from 2 to {MOST_TAGS:,} tags, found {len(counts):,}"
            )
        self.data.labels = numbered_names(counts, self.data.labels, load_config(self.folder).id2label or {})
        if held_out:
            numbers_of(self.data.labels, label_counts(held_out, self.reporter))
        if not self.entities:
            self.reporter.say(
                "the tags are not those of entities (O, B-…, I-…), so words are counted and not entities; data.labels "
                "gives numbers their names"
            )

    @property
    def entities(self) -> bool:
        """Whether tags say where entities are."""
        return all(map(metrics.is_entity_tag, self.data.labels))

    def config(self) -> dict[str, Any]:
        names = dict(enumerate(self.data.labels))
        return {"id2label": names, "label2id": {name: number for number, name in names.items()}}

    def _load(self, *where: Any) -> list[str]:
        heads = super()._load(*where)
        if getattr(self.tokenizer, "add_prefix_space", None) is False:  # words that come alone are words all the same
            self.tokenizer = type(self.tokenizer).from_pretrained(
                where[0], add_prefix_space=True, local_files_only=True
            )
        return heads

    def typed(self, text: str, other: str | None) -> Labelled:
        if other is not None or not text.split():
            raise AdapterError("the adapter was trained on lists of words: give one text, with at least one word")
        return Labelled("the text", tuple(text.split()))

    def encode(self, batch: Sequence[Labelled]) -> Iterable[tuple[int, Encoded]]:
        found = self.tokenizer(
            [list(document.texts) for document in batch],
            is_split_into_words=True,
            truncation=True,
            max_length=self.data.max_length,
            return_token_type_ids=True,
            verbose=False,
        )
        known = numbers_of(self.data.labels, {written(tag) for own in batch for tag in own.label or ()})
        for i, (document, encoding) in enumerate(zip(batch, found.encodings, strict=True)):
            words = [-1 if word is None else word for word in encoding.word_ids]
            tags, before = [], -1
            for word in words:
                begins, before = word not in (-1, before), word
                own = known[written(document.label[word])] if begins and document.label else UNKNOWN
                tags.append(own if begins else NOTHING)
            ids, segments = found["input_ids"][i], found["token_type_ids"][i]
            tokens = records(self.fields, input_ids=ids, segments=segments, tag=tags, word=words)
            yield i, (tokens, (len(document.texts),), bool(encoding.overflowing))

    def inputs(self, tokens: list[Any], table: Any) -> dict[str, Tensor]:
        return {"labels": filled([own["tag"].tolist() for own in tokens], NOTHING)}

    def units(self, inputs: Mapping[str, Tensor]) -> int:
        return int((inputs["labels"] != NOTHING).sum())

    def outputs(self, batch: Batch) -> Tensor:
        logits = self.model(**self.given(batch)).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # (rows, tokens, tags)

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(
            outputs.flatten(0, 1), batch.inputs["labels"].flatten(), reduction="sum", ignore_index=NOTHING
        )

    def reading(self, output: Tensor, part: Part, example: int) -> Any:
        own = part.examples[example]
        begins = np.flatnonzero(own["tag"] != NOTHING)
        best = output[begins].softmax(-1).max(-1)
        return own["word"][begins].tolist(), best.indices.tolist(), best.values.tolist()

    def predictions(self, part: Part, readings: Mapping[int, Any]) -> list[dict[str, Any]]:
        """Words that were cut off, or have no token, are outside of every entity, or have no tag."""
        names = self.data.labels
        outside, said = "O" if "O" in names else "", []
        for example in sorted(readings):
            count = int(part.examples.table["words"][example])
            tags, shares = [outside] * count, [0.0] * count
            for word, tag, share in zip(*readings[example], strict=True):
                tags[word], shares[word] = names[tag], share
            said.append({"tags": tags, "probabilities": shares})
        return said

    def figures(self, part: Part, documents: Sequence[int], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        names = self.data.labels
        true = [self._tags(part.documents[int(part.examples.of[i])]) for i in part.of_documents(documents)]
        said = [own["tags"] for own in predictions]
        right = sum(a == b for ours, theirs in zip(said, true, strict=True) for a, b in zip(ours, theirs, strict=True))
        figures = {"accuracy": right / max(1, sum(map(len, true)))}
        return {**(metrics.entity_figures(said, true) if self.entities else {}), **figures} if names else figures

    def judges(self) -> list[str]:
        return ["f1", "precision", "recall", "accuracy"] if self.entities else ["accuracy"]

    def label_shares(self, examples: Examples) -> dict[str, int]:
        return {}

    def _tags(self, document: Labelled) -> list[str]:
        known = numbers_of(self.data.labels, set(map(written, document.label)))
        return [self.data.labels[known[written(tag)]] for tag in document.label]

    def shown(self, document: Labelled, said: dict[str, Any]) -> dict[str, str]:
        both = {"label": self._tags(document), "predicted": said["tags"]}
        told = {key: " ".join(_marked(document.texts, tags)) for key, tags in both.items()}
        shares = said["probabilities"]
        return {"words": " ".join(document.texts), **told, "probability": f"{sum(shares) / len(shares):.2f} a word"}

    def look(self, document: Labelled) -> list[tuple[str, bool]]:
        pairs = zip(document.texts, self._tags(document), strict=True)
        return [run for word, tag in pairs for run in ((f"{word}/", False), (f"{tag} ", True))]


def _marked(words: Sequence[str], tags: Sequence[str]) -> list[str]:
    """The words that have a tag, with it."""
    return [f"{word}/{tag}" for word, tag in zip(words, tags, strict=True) if tag not in ("O", "")]


def _list(value: object, of: Any) -> list[Any] | None:
    """The value as a list, where it is one of such things."""
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
        return None
    found = list(value)
    return found if all(isinstance(own, of) for own in found) else None
