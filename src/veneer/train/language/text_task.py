"""What the tasks of language models share: a base, rows as tokens, batches of them, held-out figures, answers."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer import zoo
from veneer.core.errors import AdapterError
from veneer.core.model import get_peft_model
from veneer.train.bases.heads import load_config
from veneer.train.bases.loading import choose_device, choose_dtype, load_language_model, load_tokenizer
from veneer.train.data.rows import evenly
from veneer.train.language.answers import answer, pad_of
from veneer.train.language.loss import ends_with_head, head_input, learned_losses, only, token_losses
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
from veneer.train.language.parts import Part, Question, questions, read_documents, tokenised
from veneer.train.language.shapes import opening, typed
from veneer.train.language.sources import Documents
from veneer.train.language.text_figures import perplexity, text_figures
from veneer.train.language.tokens import Example, coloured, encode, encode_prompt
from veneer.train.products import keep_few_programs
from veneer.train.sameness import digest_of_base
from veneer.train.task import Batch, Reporter, Task


class TextTask(Task):
    """Only learned tokens reach the head of the model."""

    two_parts: ClassVar[bool] = False  # an encoder, and a decoder
    task_type: ClassVar[str] = "CAUSAL_LM"  # as PEFT calls the task
    encode: ClassVar[Any] = staticmethod(encode)  # (documents, tokenizer, data) → Encoded of each
    encode_prompt: ClassVar[Any] = staticmethod(encode_prompt)  # (opening, tokenizer, data) → ids
    first_place: int | None = None  # of a packed row's documents; None where rows are padded

    def __init__(self, recipe: Any, reporter: Reporter) -> None:
        self.recipe, self.reporter = recipe, reporter
        keep_few_programs()
        device = choose_device(recipe.device)
        recipe.device = str(device)
        learned, held_out = self.read()
        folder = self.folder = zoo.resolve(recipe.base)
        recipe.dtype = choose_dtype(recipe.dtype, device, folder)
        config = load_config(folder)
        if config.is_encoder_decoder != self.two_parts:
            kind, other = ("a decoder", "causal-lm") if self.two_parts else ("an encoder and a decoder", "text-to-text")
            raise AdapterError(f"base {recipe.base}: a {config.model_type} is {kind}; say task={other}")
        self._shorten_rows(getattr(config, "max_position_embeddings", None))
        self.tokenizer = load_tokenizer(folder)
        self.part = self._tokenised(learned, "rows")
        self.held_out = self._tokenised(held_out, "held-out rows") if held_out else None
        if recipe.data.eval_share and not held_out:
            reporter.say("held-out rows: none, because all rows have the same prompt; data.eval_path names some")
        self.size = len(self.part.examples)
        self.base_answers: list[str] | None = None  # they stay what they are
        model = load_language_model(folder, recipe.dtype, device, recipe.quantization)
        torch.manual_seed(recipe.train.seed)
        self.settle(model)
        self.head = model.get_output_embeddings() if ends_with_head(model) else None
        recipe.train.pass_tokens = recipe.train.pass_tokens or most_tokens(model)
        self.model: Any = get_peft_model(model, recipe.adapter)
        self.model.peft_config["default"].base_model_name_or_path = recipe.base
        self.model.peft_config["default"].task_type = self.task_type

    def read(self) -> tuple[Documents[Any], Documents[Any]]:
        """(learned from, held out)."""
        return read_documents(self.recipe.data, self.recipe.train.seed, self.reporter)

    def settle(self, model: Any) -> None:
        """Make the base ready for the adapter: by packing, where the recipe wants it and the model can do it."""
        if not self.recipe.train.packing:
            return
        self.first_place = find_packing(model)
        if self.first_place is None:
            self.reporter.say(f"rows are padded: a {model.config.model_type} cannot be packed, as a trial shows")

    def _shorten_rows(self, most: int | None) -> None:
        for key in ("max_length", "max_completion"):
            if most is not None and getattr(self.recipe.data, key, 0) > most:
                self.reporter.say(f"data.{key} is {most}, the most tokens that {self.recipe.base} reads")
                setattr(self.recipe.data, key, most)

    def _tokenised(self, documents: Documents[Any], name: str) -> Part:
        try:
            part = tokenised(documents, self.tokenizer, self.recipe.data, self.reporter, name, self.encode)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error
        self.reporter.say(f"{name}: {' '.join(part.report.sentences())}")
        return part

    def batches(self, rows: Sequence[int]) -> list[Batch]:
        return self._batches(self.part, rows)

    def loss(self, batch: Batch) -> Tensor:
        smoothing = self.recipe.train.label_smoothing if self.model.training else 0.0
        return self.losses(batch, smoothing).sum()

    def losses(self, batch: Batch, smoothing: float = 0.0) -> Tensor:
        """-log p of each learned token `(tokens)`, in fp32."""
        inputs = dict(batch.inputs)
        keep, targets = inputs.pop("keep"), inputs.pop("targets")
        if self.head is None:
            with only(self.model.get_output_embeddings(), keep):
                logits = self.model(**inputs, use_cache=False).logits
            return token_losses(logits if logits.ndim == 2 else logits[keep], targets, smoothing)
        with head_input(self.head) as given:
            self.model(**inputs, use_cache=False)
        return learned_losses(given[0][keep], self.head, targets, smoothing)

    @torch.no_grad()
    def evaluate(self, whole: bool) -> dict[str, float]:
        if self.held_out is None:
            return {}
        figures = self.figures(self.held_out)
        wanted = getattr(self.recipe.eval, "answers", 0)
        asked = evenly(questions(self.held_out), wanted) if whole else []
        if asked:
            told = text_figures(self._answers(asked), [q.references for q in asked], self.recipe.eval.figures)
            figures |= told
        return figures

    def figures(self, part: Part) -> dict[str, float]:
        """What one pass over held-out rows tells."""
        total, units = 0.0, 0
        for batch in self.held_out_batches(part):
            total, units = total + self.loss(batch).item(), units + batch.units
        return {"eval_loss": total / units, "perplexity": perplexity(total / units)}

    def sample(self) -> list[dict[str, str]]:
        asked = self._questions()
        if not asked:
            return []
        prompts = [self.encode_prompt(prompt, self.tokenizer, self.recipe.data) for prompt, _ in asked]
        options = {
            "max_new_tokens": self.recipe.sample.max_new_tokens,
            "num_beams": getattr(self.recipe.eval, "beams", 1),
        }
        if self.base_answers is None:
            with self.model.disable_adapter():
                self.base_answers = answer(self.model, self.tokenizer, prompts, **options)
        before, after = self.base_answers, answer(self.model, self.tokenizer, prompts, **options)
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
        return {"task": self.recipe.task, "base": self.recipe.base, "data": self.reading()}

    def reading(self) -> dict[str, Any]:
        """How a prompt was read, as settings of the data."""
        keys = {"shape", "prompt", "completion", "chat"}
        return dict(self.recipe.data.model_dump(include=keys))

    def _batches(self, part: Part, rows: Sequence[int]) -> list[Batch]:
        """The rows in passes of at most `train.pass_tokens` tokens."""
        lengths = [int(part.examples.lengths[row]) for row in rows]
        most = self.recipe.train.pass_tokens
        shared = passes(lengths, most or sum(lengths), pads=self.first_place is None)
        return [self._batch(part, [rows[i] for i in own]) for own in shared]

    def _batch(self, part: Part, rows: Sequence[int]) -> Batch:
        """One pass."""
        examples = [part.examples[row] for row in rows]
        inputs, units = self.inputs(examples)
        tokens = sum(len(own.ids) for own in examples)
        places = [part.place(row) for row in rows]
        return Batch(on_device(inputs, self.model.device), units, tokens, places)

    def inputs(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], int]:
        """What goes through the model, and what its loss is averaged over: `keep` marks the places whose next token is
        learned, `targets` are those.
        """
        ids, flags = [example.ids for example in examples], [[0, *example.learned[1:]] for example in examples]
        if self.first_place is None:
            inputs, learned = padded(ids, pad_of(self.tokenizer)), filled(flags, 0).bool()
        else:
            inputs, learned = packed(ids, self.first_place), end_to_end(flags).bool()
        keep = F.pad(learned[:, 1:], (0, 1))
        targets = inputs["input_ids"][:, 1:][learned[:, 1:]]  # (learned tokens)
        return inputs | {"keep": keep, "targets": targets}, len(targets)

    def held_out_batches(self, part: Part) -> Iterable[Batch]:
        """Held-out rows, evenly spread; those of like length together. Meanwhile nothing is dropped."""
        rows = evenly(range(len(part.examples)), self.recipe.eval.rows)
        rows.sort(key=lambda row: int(part.examples.lengths[row]))
        size = self.recipe.train.batch_size
        self.model.eval()
        for start in range(0, len(rows), size):
            yield from self._batches(part, rows[start : start + size])
            self.reporter.progress("held-out loss", min(start + size, len(rows)), len(rows))

    def _answers(self, asked: list[Question]) -> list[str]:
        prompts = [self.encode_prompt(q.document.opening, self.tokenizer, self.recipe.data) for q in asked]
        own = self.recipe.eval

        def progress(done: int, total: int) -> None:
            self.reporter.progress("held-out answers", done, total)

        return answer(self.model, self.tokenizer, prompts, own.max_new_tokens, progress=progress, num_beams=own.beams)

    def _questions(self) -> list[tuple[Any, Question | None]]:
        """What is asked for the samples: the recipe's own prompts, or held-out ones."""
        wanted = self.recipe.sample
        if wanted.prompts is not None:
            return [(opening(prompt, self.recipe.data), None) for prompt in wanted.prompts]
        if self.held_out is None or not wanted.count:
            return []
        return [(q.document.opening, q) for q in evenly(questions(self.held_out), wanted.count)]
