"""The task `causal-lm`: a decoder learns to continue text. Only learned tokens reach the head."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from veneer import zoo
from veneer.core.errors import AdapterError
from veneer.core.model import get_peft_model
from veneer.train.language.answers import answer, bleu, pad_of
from veneer.train.language.model import choose_device, choose_dtype, load_causal_lm, load_tokenizer, longest_row
from veneer.train.language.parts import Part, Question, evenly, questions, read_documents, tokenised
from veneer.train.language.settings import LanguageData, LanguageEvaluation, LanguageSample
from veneer.train.language.shapes import Document, opening, typed
from veneer.train.language.tokens import coloured, encode_prompt
from veneer.train.settings import Recipe
from veneer.train.task import Batch, Reporter, Task


class CausalLMRecipe(Recipe):
    """A recipe for a causal language model."""

    data: LanguageData
    eval: LanguageEvaluation = Field(default_factory=LanguageEvaluation)
    sample: LanguageSample = Field(default_factory=LanguageSample)


class CausalLM(Task):
    """log p(token | what stands before it), summed over the learned tokens."""

    settings: ClassVar = CausalLMRecipe

    def __init__(self, recipe: CausalLMRecipe, reporter: Reporter) -> None:
        self.recipe, self.reporter = recipe, reporter
        device = choose_device(recipe.device)
        recipe.device, recipe.dtype = str(device), choose_dtype(recipe.dtype, device)  # type: ignore[assignment]
        learned, held_out = read_documents(recipe.data, recipe.train.seed)
        folder = zoo.resolve(recipe.base)
        self._shorten_rows(longest_row(folder))
        self.tokenizer = load_tokenizer(folder)
        self.part = self._tokenised(learned, "rows")
        self.held_out = self._tokenised(held_out, "held-out rows") if held_out else None
        if recipe.data.eval_share and not held_out:
            reporter.say("held-out rows: none, because all rows have the same prompt; data.eval_path names some")
        self.size = len(self.part.examples)
        model = load_causal_lm(folder, recipe.dtype, device, recipe.quantization)
        torch.manual_seed(recipe.train.seed)
        self.model: Any = get_peft_model(model, recipe.adapter)
        self.model.peft_config["default"].base_model_name_or_path = recipe.base
        self.model.peft_config["default"].task_type = "CAUSAL_LM"

    def _shorten_rows(self, most: int | None) -> None:
        if most is not None and self.recipe.data.max_length > most:
            self.reporter.say(f"data.max_length is {most}, the most tokens that {self.recipe.base} reads")
            self.recipe.data.max_length = most

    def _tokenised(self, documents: list[Document], name: str) -> Part:
        try:
            part = tokenised(documents, self.tokenizer, self.recipe.data)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error
        self.reporter.say(f"{name}: {' '.join(part.report.sentences())}")
        return part

    def batches(self, rows: Sequence[int]) -> list[Batch]:
        return [self._batch(self.part, rows)]

    def loss(self, batch: Batch) -> Tensor:
        keep, targets = batch.inputs["keep"], batch.inputs["targets"]
        with _only(self.model.get_output_embeddings(), keep):
            logits = self.model(
                input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"], use_cache=False
            ).logits
        logits = logits if logits.ndim == 2 else logits[keep]  # (learned tokens, vocabulary)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def evaluate(self, whole: bool) -> dict[str, float]:
        if self.held_out is None:
            return {}
        figures = {"eval_loss": self._held_out_loss(self.held_out)}
        asked = evenly(questions(self.held_out), self.recipe.eval.answers) if whole else []
        if asked:
            figures["bleu"] = self._bleu(asked)
        return figures

    def sample(self) -> list[dict[str, str]]:
        asked = self._questions()
        if not asked:
            return []
        prompts = [encode_prompt(prompt, self.tokenizer, self.recipe.data) for prompt, _ in asked]
        most = self.recipe.sample.max_new_tokens
        with self.model.disable_adapter():
            before = answer(self.model, self.tokenizer, prompts, most)
        after = answer(self.model, self.tokenizer, prompts, most)
        texts = [typed(prompt, self.recipe.data) for prompt, _ in asked]
        return [
            {"prompt": text, "base": old, "adapted": new, "reference": question.references[0] if question else ""}
            for text, old, new, (_, question) in zip(texts, before, after, asked, strict=True)
        ]

    def facts(self) -> dict[str, Any]:
        examples = self.part.examples
        longest = max(range(len(examples)), key=lambda row: len(examples[row].ids))
        looks = [coloured(example, self.tokenizer) for example in evenly(examples, 3)]
        return {"report": self.part.report, "longest row": longest, "looks": looks}

    def usage(self) -> dict[str, Any]:
        keys = ("shape", "prompt", "completion", "chat")
        return {
            "task": self.recipe.task,
            "base": self.recipe.base,
            "data": self.recipe.data.model_dump(include=set(keys)),
        }

    def _batch(self, part: Part, rows: Sequence[int]) -> Batch:
        """Rows padded on the right; `keep` marks the places whose next token is learned, `targets` are those."""
        examples = [part.examples[row] for row in rows]
        longest = max(len(example.ids) for example in examples)
        ids = torch.full((len(rows), longest), pad_of(self.tokenizer))  # (rows, tokens)
        mask = torch.zeros_like(ids)
        learned = torch.zeros(ids.shape, dtype=torch.bool)
        for i, example in enumerate(examples):
            length = len(example.ids)
            ids[i, :length] = torch.tensor(example.ids)
            mask[i, :length] = 1
            learned[i, :length] = torch.tensor(list(example.learned), dtype=torch.bool)
        keep = F.pad(learned[:, 1:], (0, 1))
        targets = ids[:, 1:][learned[:, 1:]]  # (learned tokens)
        inputs = {"input_ids": ids, "attention_mask": mask, "keep": keep, "targets": targets}
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        return Batch(inputs, len(targets), int(mask.sum()), [part.place(row) for row in rows])

    @torch.no_grad()
    def _held_out_loss(self, part: Part) -> float:
        rows = evenly(list(range(len(part.examples))), self.recipe.eval.rows)
        rows.sort(key=lambda row: len(part.examples[row].ids))
        total, units, size = 0.0, 0, self.recipe.train.batch_size
        self.model.eval()
        for start in range(0, len(rows), size):
            batch = self._batch(part, rows[start : start + size])
            total += self.loss(batch).item()
            units += batch.units
            self.reporter.progress("held-out loss", min(start + size, len(rows)), len(rows))
        return total / units

    def _bleu(self, asked: list[Question]) -> float:
        prompts = [encode_prompt(q.document.opening, self.tokenizer, self.recipe.data) for q in asked]

        def progress(done: int, total: int) -> None:
            self.reporter.progress("held-out answers", done, total)

        answers = answer(self.model, self.tokenizer, prompts, self.recipe.eval.max_new_tokens, progress=progress)
        return bleu(answers, [question.references for question in asked])

    def _questions(self) -> list[tuple[Any, Question | None]]:
        """What is asked for the samples: the recipe's own prompts, or held-out ones."""
        wanted = self.recipe.sample
        if wanted.prompts is not None:
            return [(opening(prompt, self.recipe.data), None) for prompt in wanted.prompts]
        if self.held_out is None or not wanted.count:
            return []
        return [(q.document.opening, q) for q in evenly(questions(self.held_out), wanted.count)]


@contextmanager
def _only(head: nn.Module | None, keep: Tensor) -> Iterator[None]:
    """Inside, the output layer sees only the places that `keep (rows, tokens)` marks: `(places, hidden)`."""
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][keep], *args[1:]))
    try:
        yield
    finally:
        handle.remove()
