"""The task `causal-lm`: a decoder learns to continue text. Only learned tokens reach the head."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from veneer import zoo
from veneer.core.model import get_peft_model
from veneer.train.language.answers import answer, bleu, pad_of
from veneer.train.language.model import choose_device, choose_dtype, load_causal_lm, load_tokenizer
from veneer.train.language.parts import Part, Question, evenly, questions, read_parts
from veneer.train.language.settings import LanguageData, LanguageEvaluation, LanguageSample
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
    unit: ClassVar = "learned tokens"

    def __init__(self, recipe: CausalLMRecipe, reporter: Reporter) -> None:
        self.recipe, self.reporter = recipe, reporter
        device = choose_device(recipe.device)
        recipe.dtype = choose_dtype(recipe.dtype, device)  # type: ignore[assignment]
        folder = zoo.resolve(recipe.base)
        self.tokenizer = load_tokenizer(folder)
        self.part, self.held_out = read_parts(recipe.data, self.tokenizer, recipe.train.seed)
        self.size = len(self.part.examples)
        for part, name in ((self.part, "rows"), (self.held_out, "held-out rows")):
            if part:
                reporter.say(f"{name}: {' '.join(part.report.sentences())}")
        model = load_causal_lm(folder, recipe.dtype, device)
        torch.manual_seed(recipe.train.seed)
        self.model: Any = get_peft_model(model, recipe.adapter)
        self.model.peft_config["default"].base_model_name_or_path = recipe.base
        self.model.peft_config["default"].task_type = "CAUSAL_LM"

    def batch(self, rows: Sequence[int]) -> Batch:
        return self._batch(self.part, rows)

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

    def sample(self, folder: Path) -> list[dict[str, str]]:
        asked = self._questions()
        if not asked:
            return []
        prompts = [encode_prompt(prompt, self.tokenizer, self.recipe.data) for prompt, _ in asked]
        most = self.recipe.sample.max_new_tokens
        with self.model.disable_adapter():
            before = answer(self.model, self.tokenizer, prompts, most)
        after = answer(self.model, self.tokenizer, prompts, most)
        texts = [self.recipe.data.typed(p if isinstance(p, str) else p[-1]["content"]) for p, _ in asked]
        samples = [
            {"prompt": text, "base": old, "adapted": new, "reference": question.references[0] if question else ""}
            for text, old, new, (_, question) in zip(texts, before, after, asked, strict=True)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        (folder / "answers.jsonl").write_text(lines, encoding="utf-8")
        return samples

    def facts(self) -> dict[str, Any]:
        longest = max(len(example.ids) for example in self.part.examples)
        looks = [coloured(example, self.tokenizer) for example in evenly(self.part.examples, 3)]
        return {"report": self.part.report, "longest": longest, "looks": looks}

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
            return [(self.recipe.data.filled(prompt), None) for prompt in wanted.prompts]
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
