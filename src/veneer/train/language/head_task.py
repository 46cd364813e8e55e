"""What the tasks of a model with a head share: a base with a head that learns along, and rows that are padded."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer import zoo
from veneer.core.errors import AdapterError, listed
from veneer.core.model import get_peft_model
from veneer.train.bases.heads import load_with_head, most_positions
from veneer.train.bases.loading import choose_device, choose_dtype, load_tokenizer
from veneer.train.data.rows import Row, Rows, evenly, read_rows
from veneer.train.data.settings import RowsData
from veneer.train.language.answers import pad_of
from veneer.train.language.labelled import Encoded, Examples, Labelled, Part, encoded, reported, tokenised
from veneer.train.language.packing import extra_tokens, filled, level_passes, most_tokens, on_device, padded
from veneer.train.language.parts import read_sides
from veneer.train.language.shapes import made_of_rows
from veneer.train.language.sources import Documents, kept, program
from veneer.train.products import keep_few_programs
from veneer.train.sameness import digest_of_base
from veneer.train.store import Columns
from veneer.train.task import Batch, Reporter, Task

PROGRAM = (
    *("head_settings.py", "head_task.py", "labelled.py", "question_answering.py"),
    *("sequence_classification.py", "token_classification.py"),
    *("../data/labels.py", "../data/rows.py"),
)
AT_ONCE = 64  # rows that are shared out into passes of like length where nothing is learned


class HeadTask(Task):
    """Rows with labels, a base, and a head that starts at random and is trained and saved with the adapter."""

    kind: ClassVar[str]  # transformers' class
    task_type: ClassVar[str]  # as PEFT calls the task
    fields: ClassVar[Columns]  # of a token; `input_ids` comes first
    columns: ClassVar[Columns]  # of an example
    higher_is_better = True
    data: Any
    tokenizer: Any

    def __init__(self, recipe: Any, reporter: Reporter) -> None:
        self.recipe, self.reporter, self.data = recipe, reporter, recipe.data
        keep_few_programs()
        device = choose_device(recipe.device)
        recipe.device = str(device)
        learned, held_out = read_sides(self.data, recipe.train.seed, self._read, reporter)
        folder = self.folder = zoo.resolve(recipe.base)
        self.settle_labels(learned, held_out)
        recipe.dtype = choose_dtype(recipe.dtype, device, folder)
        torch.manual_seed(recipe.train.seed)  # which decides the head
        heads = self._load(folder, recipe.dtype, device, recipe.quantization)
        self.part = self._tokenised(learned, "rows")
        self.held_out = self._tokenised(held_out, "held-out rows") if held_out else None
        self.size = len(self.part.examples)
        self.settle_rows()
        self.judged_by = self._judge()
        self._adapt(heads)

    def _load(self, folder: Path, dtype: str | None, device: torch.device, quantization: str = "none") -> list[str]:
        """Load tokenizer and model; the modules that start at random."""
        self.tokenizer = load_tokenizer(folder)
        if not self.tokenizer.is_fast:
            raise AdapterError(f"base {folder}: its tokenizer is not a fast one: choose another base")
        model, heads = load_with_head(folder, self.kind, dtype, device, quantization, **self.config())
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = pad_of(self.tokenizer)  # decoders look for the last token before it
        self.model: Any = model
        self.most = most_tokens(model)  # tokens of a pass
        self.fit(most_positions(model, self.tokenizer))
        return heads

    def _adapt(self, heads: list[str]) -> None:
        recipe = self.recipe
        self.most = recipe.train.pass_tokens = recipe.train.pass_tokens or self.most
        if heads:
            self.reporter.say(f"{listed(heads, say=str)} start at random: trained whole, and saved with the adapter")
        recipe.adapter.modules_to_save = sorted({*(recipe.adapter.modules_to_save or []), *heads}) or None
        recipe.adapter.task_type = self.task_type
        self.model = get_peft_model(self.model, recipe.adapter)
        self.model.peft_config["default"].base_model_name_or_path = recipe.base

    def fit(self, most: int) -> None:
        """Let rows have no more tokens than the base reads."""
        if self.data.max_length > most:
            self.reporter.say(f"data.max_length is {most}, the most tokens that the base reads")
            self.data.max_length = most

    @classmethod
    def bare(cls, data: Any, folder: Path, dtype: str | None, device: torch.device) -> "HeadTask":
        """The base with a head, without rows and without an adapter yet: to be used, or merged."""
        task = cls.__new__(cls)
        task.data, task.reporter = data, Reporter()
        task._load(folder, dtype, device)
        return task

    @abstractmethod
    def settle_columns(self, rows: Rows, labelled: bool = True) -> None:
        """Say in `data` which columns are read."""

    @abstractmethod
    def document(self, row: Row, labelled: bool = True) -> Labelled:
        """A row, with its label where it is `labelled`."""

    def settle_labels(self, learned: Documents[Labelled], held_out: Documents[Labelled]) -> None:
        """Say in `data` what the labels are."""

    def settle_rows(self) -> None:
        """Say in `data` what only the examples tell."""

    def config(self) -> dict[str, Any]:
        """What the model's config must say."""
        return {}

    @abstractmethod
    def typed(self, text: str, other: str | None) -> Labelled:
        """What a person types: a text, and the second one of a pair or the question."""

    @abstractmethod
    def encode(self, batch: Sequence[Labelled]) -> Iterable[tuple[int, Encoded]]:
        """The examples of a batch of documents, each with the place of its document in the batch."""

    @abstractmethod
    def inputs(self, tokens: list[Any], table: Any) -> dict[str, Tensor]:
        """What is learned of these examples."""

    @abstractmethod
    def units(self, inputs: Mapping[str, Tensor]) -> int:
        """What the loss of these is averaged over."""

    @abstractmethod
    def outputs(self, batch: Batch) -> Tensor:
        """What the model says, in float32: a row an example."""

    @abstractmethod
    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss summed over the batch's units."""

    @abstractmethod
    def reading(self, output: Tensor, part: Part, example: int) -> Any:
        """What the model says of one example, as plain numbers."""

    @abstractmethod
    def predictions(self, part: Part, readings: Mapping[int, Any]) -> list[dict[str, Any]]:
        """What the model says of each document whose examples are read, in their order."""

    @abstractmethod
    def figures(self, part: Part, documents: Sequence[int], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """How right that is."""

    @abstractmethod
    def judges(self) -> list[str]:
        """The names of the figures; the first judges where the recipe does not say which."""

    def _judge(self) -> str:
        wanted = self.recipe.eval.judge
        if wanted not in ("auto", "loss", *self.judges()):
            raise AdapterError(f"eval.judge={wanted}: expected loss, {', '.join(self.judges())}")
        self.higher_is_better = wanted != "loss"
        return "eval_loss" if wanted == "loss" else self.judges()[0] if wanted == "auto" else wanted

    def _read(self, path: str, split: str) -> Documents[Labelled]:
        found = read_rows(path, split, self.data.subset)
        self.settle_columns(found)
        asked = self.data.model_dump(include={"problem", *self.data.columns})
        made_of = {"task": self.task_type, **asked, "program": program(PROGRAM)}

        def documents() -> Iterable[tuple[int, Labelled]]:
            return made_of_rows(found, self.document, self.recipe.task)

        return kept(found, made_of, documents, Labelled.unpacked, self.reporter)

    def _tokenised(self, found: Documents[Labelled], name: str) -> Part:
        asked = {"labels", "problem", "max_length", "stride"}
        made_of = {"task": self.task_type, **self.data.model_dump(include=asked), "program": program(PROGRAM)}
        wanted = (self.fields, self.columns, made_of, self.encode, self.reporter, name)
        store = tokenised(found.source, self.tokenizer, *wanted)
        examples = Examples(store, store.sizes(), store.table, found.chosen, self.fields)
        part = Part(found, examples, reported(found, examples, self.data.max_length, self.label_shares(examples)))
        self.reporter.say(f"{name}: {' '.join(part.report.sentences())}")
        return part

    def label_shares(self, examples: Examples) -> dict[str, int]:
        """How often each label occurs, where there are labels."""
        return {}

    def batches(self, rows: Sequence[int]) -> list[Batch]:
        return [batch for _, batch in self._passes(self.part, rows)]

    def _passes(self, part: Part, rows: Sequence[int]) -> Iterator[tuple[list[int], Batch]]:
        """The examples in passes of like length, each with the numbers of its examples."""
        lengths = [int(part.examples.lengths[row]) for row in rows]
        for own in level_passes(lengths, self.most, extra_tokens(self.model)):
            chosen = [rows[i] for i in own]
            yield chosen, self._batch(part, chosen)

    def _batch(self, part: Part, rows: Sequence[int]) -> Batch:
        tokens = [part.examples[row] for row in rows]
        inputs = padded([own["input_ids"].tolist() for own in tokens], pad_of(self.tokenizer))
        if "token_type_ids" in self.tokenizer.model_input_names:
            inputs["token_type_ids"] = filled([own["segments"].tolist() for own in tokens], 0)
        wanted = self.inputs(tokens, part.examples.table[list(rows)])
        places = [part.place(row) for row in rows]
        device = self.model.device
        return Batch(on_device(inputs | wanted, device), self.units(wanted), sum(map(len, tokens)), places)

    def given(self, batch: Batch) -> dict[str, Tensor]:
        """What of a batch is the model's."""
        return {name: own for name, own in batch.inputs.items() if name != "labels"}

    def loss(self, batch: Batch) -> Tensor:
        return self.loss_of(self.outputs(batch), batch)

    def evaluate(self, whole: bool) -> dict[str, float]:
        part = self.held_out
        if part is None:
            return {}
        most = self.recipe.eval.rows or len(part.documents)
        documents = evenly(range(len(part.documents)), most)
        total, units = 0.0, 0
        readings: dict[int, Any] = {}

        def learned(batch: Batch, outputs: Tensor) -> None:
            nonlocal total, units
            total, units = total + self.loss_of(outputs, batch).item(), units + batch.units

        self.read_out(part, documents, readings, learned)
        figures = self.figures(part, documents, self.predictions(part, readings))
        return {"eval_loss": total / max(1, units), **figures}

    @torch.no_grad()
    def read_out(
        self,
        part: Part,
        documents: Sequence[int],
        readings: dict[int, Any],
        told: Callable[[Batch, Tensor], None] = lambda batch, outputs: None,
    ) -> None:
        """Write into `readings` what the model says of the examples of these documents."""
        rows = part.of_documents(documents)
        rows.sort(key=lambda row: int(part.examples.lengths[row]))
        was_training, size = self.model.training, AT_ONCE
        self.model.eval()
        for start in range(0, len(rows), size):
            for own, batch in self._passes(part, rows[start : start + size]):
                outputs = self.outputs(batch)
                told(batch, outputs)
                readings |= {row: self.reading(outputs[i], part, row) for i, row in enumerate(own)}
            self.reporter.progress("held-out rows", min(start + size, len(rows)), len(rows))
        self.model.train(was_training)

    def said_of(self, documents: Sequence[Labelled]) -> list[dict[str, Any]]:
        """What the model says of documents in memory."""
        examples = Examples.of_these((own for _, own in encoded(documents, self.encode)), self.fields, self.columns)
        part = Part(documents, examples, reported(documents, examples, self.data.max_length, {}))
        readings: dict[int, Any] = {}
        self.read_out(part, range(len(documents)), readings)
        return self.predictions(part, readings)

    def sample(self) -> list[dict[str, str]]:
        if self.held_out is None or not self.recipe.sample.count:
            return []
        documents = self.held_out.documents
        chosen = [documents[i] for i in evenly(range(len(documents)), self.recipe.sample.count)]
        return [self.shown(own, said) for own, said in zip(chosen, self.said_of(chosen), strict=True)]

    @abstractmethod
    def shown(self, document: Labelled, said: dict[str, Any]) -> dict[str, str]:
        """A document, its label and what the model says of it, for people."""

    def facts(self) -> dict[str, Any]:
        chosen = [self.part.documents[i] for i in evenly(range(len(self.part.documents)), 3)]
        return {"report": self.part.report, "looks": [self.look(document) for document in chosen]}

    @abstractmethod
    def look(self, document: Labelled) -> list[tuple[str, bool]]:
        """A document as runs of text, each with whether it is what is learned."""

    def made_of(self) -> dict[str, str]:
        held_out = {"held-out rows": self.held_out.examples.digest()} if self.held_out else {}
        return {"rows": self.part.examples.digest(), **held_out, "base": digest_of_base(self.folder)}

    def usage(self) -> dict[str, Any]:
        data = self.data.model_dump(exclude=set(RowsData.model_fields), exclude_none=True)
        return {"task": self.recipe.task, "base": self.recipe.base, "data": data}
