"""The task `causal-lm`: a decoder learns to continue text. Only learned tokens reach the head."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from veneer import zoo
from veneer.core.errors import AdapterError
from veneer.core.model import get_peft_model
from veneer.train.language.answers import answer, bleu, pad_of
from veneer.train.language.loss import ends_with_head, head_input, learned_loss, only, token_loss
from veneer.train.language.model import choose_device, choose_dtype, load_causal_lm, load_tokenizer, longest_row
from veneer.train.language.packing import (
    end_to_end,
    filled,
    find_packing,
    most_tokens,
    on_device,
    packed,
    padded,
    passes,
)
from veneer.train.language.parts import Part, Question, evenly, questions, read_documents, tokenised
from veneer.train.language.settings import LanguageData, LanguageEvaluation, LanguageSample, LanguageTraining
from veneer.train.language.shapes import Document, opening, typed
from veneer.train.language.sources import Documents
from veneer.train.language.tokens import coloured, encode_prompt
from veneer.train.sameness import digest_of_base
from veneer.train.settings import Recipe
from veneer.train.task import Batch, Reporter, Task


class CausalLMRecipe(Recipe):
    """A recipe for a causal language model."""

    data: LanguageData
    eval: LanguageEvaluation = Field(default_factory=LanguageEvaluation)
    sample: LanguageSample = Field(default_factory=LanguageSample)
    train: LanguageTraining = Field(default_factory=LanguageTraining)


class CausalLM(Task):
    """log p(token | what stands before it), summed over the learned tokens."""

    settings: ClassVar = CausalLMRecipe

    def __init__(self, recipe: CausalLMRecipe, reporter: Reporter) -> None:
        self.recipe, self.reporter = recipe, reporter
        device = choose_device(recipe.device)
        recipe.device = str(device)
        learned, held_out = read_documents(recipe.data, recipe.train.seed, reporter)
        folder = self.folder = zoo.resolve(recipe.base)
        recipe.dtype = choose_dtype(recipe.dtype, device, folder)  # type: ignore[assignment]
        self._shorten_rows(longest_row(folder))
        self.tokenizer = load_tokenizer(folder)
        self.part = self._tokenised(learned, "rows")
        self.held_out = self._tokenised(held_out, "held-out rows") if held_out else None
        if recipe.data.eval_share and not held_out:
            reporter.say("held-out rows: none, because all rows have the same prompt; data.eval_path names some")
        self.size = len(self.part.examples)
        self.base_answers: list[str] | None = None  # they stay what they are
        model = load_causal_lm(folder, recipe.dtype, device, recipe.quantization)
        torch.manual_seed(recipe.train.seed)
        self.first_place = find_packing(model) if recipe.train.packing else None
        if recipe.train.packing and self.first_place is None:
            reporter.say(f"rows are padded: a {model.config.model_type} cannot be packed, as a trial shows")
        self.head = model.get_output_embeddings() if ends_with_head(model) else None
        recipe.train.pass_tokens = recipe.train.pass_tokens or most_tokens(model)
        self.model: Any = get_peft_model(model, recipe.adapter)
        self.model.peft_config["default"].base_model_name_or_path = recipe.base
        self.model.peft_config["default"].task_type = "CAUSAL_LM"

    def _shorten_rows(self, most: int | None) -> None:
        if most is not None and self.recipe.data.max_length > most:
            self.reporter.say(f"data.max_length is {most}, the most tokens that {self.recipe.base} reads")
            self.recipe.data.max_length = most

    def _tokenised(self, documents: Documents[Document], name: str) -> Part:
        try:
            part = tokenised(documents, self.tokenizer, self.recipe.data, self.reporter, name)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error
        self.reporter.say(f"{name}: {' '.join(part.report.sentences())}")
        return part

    def batches(self, rows: Sequence[int]) -> list[Batch]:
        return self._batches(self.part, rows)

    def loss(self, batch: Batch) -> Tensor:
        inputs, smoothing = dict(batch.inputs), self.recipe.train.label_smoothing if self.model.training else 0.0
        keep, targets = inputs.pop("keep"), inputs.pop("targets")
        if self.head is None:
            with only(self.model.get_output_embeddings(), keep):
                logits = self.model(**inputs, use_cache=False).logits
            return token_loss(logits if logits.ndim == 2 else logits[keep], targets, smoothing)
        with head_input(self.head) as given:
            self.model(**inputs, use_cache=False)
        return learned_loss(given[0][keep], self.head, targets, smoothing)

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
        if self.base_answers is None:
            with self.model.disable_adapter():
                self.base_answers = answer(self.model, self.tokenizer, prompts, most)
        before, after = self.base_answers, answer(self.model, self.tokenizer, prompts, most)
        texts = [typed(prompt, self.recipe.data) for prompt, _ in asked]
        return [
            {"prompt": text, "base": old, "adapted": new, "reference": question.references[0] if question else ""}
            for text, old, new, (_, question) in zip(texts, before, after, asked, strict=True)
        ]

    def facts(self) -> dict[str, Any]:
        looks = [coloured(example, self.tokenizer) for example in evenly(self.part.examples, 3)]
        return {"report": self.part.report, "looks": looks}

    def made_of(self) -> dict[str, str]:
        held_out = {"held-out rows": self.held_out.examples.digest()} if self.held_out else {}
        return {"rows": self.part.examples.digest(), **held_out, "base": digest_of_base(self.folder)}

    def usage(self) -> dict[str, Any]:
        keys = ("shape", "prompt", "completion", "chat")
        return {
            "task": self.recipe.task,
            "base": self.recipe.base,
            "data": self.recipe.data.model_dump(include=set(keys)),
        }

    def _batches(self, part: Part, rows: Sequence[int]) -> list[Batch]:
        """The rows in passes of at most `train.pass_tokens` tokens."""
        lengths = [int(part.examples.lengths[row]) for row in rows]
        most = self.recipe.train.pass_tokens
        shared = passes(lengths, most or sum(lengths), pads=self.first_place is None)
        return [self._batch(part, [rows[i] for i in own]) for own in shared]

    def _batch(self, part: Part, rows: Sequence[int]) -> Batch:
        """One pass: `keep` marks the places whose next token is learned, `targets` are those."""
        examples = [part.examples[row] for row in rows]
        ids, flags = [example.ids for example in examples], [[0, *example.learned[1:]] for example in examples]
        if self.first_place is None:
            inputs, learned = padded(ids, pad_of(self.tokenizer)), filled(flags, 0).bool()
        else:
            inputs, learned = packed(ids, self.first_place), end_to_end(flags).bool()
        keep = F.pad(learned[:, 1:], (0, 1))
        inputs |= {"keep": keep, "targets": inputs["input_ids"][:, 1:][learned[:, 1:]]}  # (learned tokens)
        tokens = sum(len(own) for own in ids)
        places = [part.place(row) for row in rows]
        return Batch(on_device(inputs, self.model.device), len(inputs["targets"]), tokens, places)

    @torch.no_grad()
    def _held_out_loss(self, part: Part) -> float:
        rows = evenly(range(len(part.examples)), self.recipe.eval.rows)
        rows.sort(key=lambda row: int(part.examples.lengths[row]))
        total, units, size = 0.0, 0, self.recipe.train.batch_size
        self.model.eval()
        for start in range(0, len(rows), size):
            for batch in self._batches(part, rows[start : start + size]):
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
