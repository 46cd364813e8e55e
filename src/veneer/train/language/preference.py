"""The task `preference`: of two completions, the chosen one becomes likelier than the rejected one (DPO)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from veneer.train.data.rows import read_rows
from veneer.train.language.comparisons import Comparison, comparison, encode_comparisons, halves, settle_shape
from veneer.train.language.parts import Part, read_sides
from veneer.train.language.settings import PreferenceData
from veneer.train.language.shapes import made_of_rows
from veneer.train.language.sources import PROGRAM, Documents, kept, program
from veneer.train.language.task_settings import LanguageSample, LossEvaluation, PreferenceTraining
from veneer.train.language.text_task import TextTask
from veneer.train.language.tokens import Example
from veneer.train.settings import Recipe
from veneer.train.task import Batch


class PreferenceRecipe(Recipe):
    """A recipe for learning from comparisons."""

    data: PreferenceData
    eval: LossEvaluation = Field(default_factory=LossEvaluation)
    sample: LanguageSample = Field(default_factory=LanguageSample)
    train: PreferenceTraining = Field(default_factory=PreferenceTraining)


class Preference(TextTask):
    """-log σ(m), m = β ((log π(c) - log π(r)) - (log π₀(c) - log π₀(r))), summed over the rows (Rafailov et al. 2023,
    arXiv:2305.18290).

    c and r are a row's chosen and rejected completion, π the model, and π₀ the model without its adapter: its part is
    computed anew in the very pass of π, so that m is 0 to the bit where the adapter changes nothing.
    """

    settings: ClassVar = PreferenceRecipe
    encode: ClassVar[Any] = staticmethod(encode_comparisons)

    def read(self) -> tuple[Documents[Comparison], Documents[Comparison]]:
        return read_sides(self.recipe.data, self.recipe.train.seed, self._read, self.reporter)

    def _read(self, path: str, split: str) -> Documents[Comparison]:
        data = self.recipe.data
        found = read_rows(path, split, data.subset)
        settle_shape(found, data)
        asked = data.model_dump(include={"shape", "prompt", "chosen", "rejected", "chat"})
        made_of = {"comparisons": asked, "program": program(PROGRAM)}
        rows = lambda: made_of_rows(found, lambda row: comparison(row, data), "comparisons")  # noqa: E731
        return kept(found, made_of, rows, Comparison.unpacked, self.reporter)

    def settle(self, model: Any) -> None:
        without_dropout(model)
        super().settle(model)

    def inputs(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], int]:
        both = [half for example in examples for half in halves(example)]
        inputs, _ = super().inputs(both)
        counts = [sum(half.learned[1:]) for half in both]
        return inputs | {"counts": torch.tensor(counts).view(-1, 2)}, len(examples)

    def loss(self, batch: Batch) -> Tensor:
        return self.loss_of(self.margins(batch))

    def loss_of(self, margins: Tensor) -> Tensor:
        """The loss of margins, summed. With label smoothing ε (cDPO, Mitchell 2023) a preference is the wrong way round
        with the probability ε; `ipo` is (m / β - 1 / 2β)² (Azar et al. 2023, arXiv:2310.12036).
        """
        own = self.recipe.train
        smoothing = own.label_smoothing if self.model.training else 0.0
        if own.loss == "ipo":
            right, wrong = ((sign * margins / own.beta - 0.5 / own.beta) ** 2 for sign in (1, -1))
        else:
            right, wrong = (-F.logsigmoid(sign * margins) for sign in (1, -1))
        return ((1 - smoothing) * right + smoothing * wrong).sum()

    def margins(self, batch: Batch) -> Tensor:
        """m of each row `(rows)`, in fp32."""
        inputs = dict(batch.inputs)
        counts = inputs.pop("counts").flatten().tolist()
        own = Batch(inputs, batch.units, batch.amount, batch.places)
        with torch.no_grad(), self.model.disable_adapter():
            before = self.losses(own)
        changes = before - self.losses(own)  # log π - log π₀ of each learned token
        of_each = torch.stack([part.sum() for part in changes.split(counts)]).view(-1, 2)
        return self.recipe.train.beta * (of_each[:, 0] - of_each[:, 1])

    def figures(self, part: Part) -> dict[str, float]:
        """The loss; how often the chosen completion has gained more on π₀ than the rejected one, a tie being half a
        time; the mean margin.
        """
        margins = torch.cat([self.margins(batch).double().cpu() for batch in self.held_out_batches(part)])
        accuracy = ((margins > 0).double() + 0.5 * (margins == 0)).mean()
        loss = self.loss_of(margins) / len(margins)
        return {"eval_loss": loss.item(), "accuracy": accuracy.item(), "margin": margins.mean().item()}

    def usage(self) -> dict[str, Any]:
        own = self.recipe.train.model_dump(include={"beta", "loss"})
        return {**super().usage(), "train": own}  # what the figures are of

    def reading(self) -> dict[str, Any]:
        data = self.recipe.data
        return {"shape": data.shape, "prompt": data.prompt, "completion": data.chosen, "chat": data.chat}


def without_dropout(base: nn.Module) -> None:
    """Let a base drop nothing in training: then what it says with an adapter differs from what it says without by the
    adapter alone. Adapters have a dropout of their own.
    """
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
