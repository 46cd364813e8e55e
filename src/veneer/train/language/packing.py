"""Packing: documents laid end to end in one row, so that no padding goes through the model.

Whether a model can be packed is found by trying: two documents packed give what each gives alone, and what the one
gives has no gradient in the other's tokens, or they are not.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from veneer.train.bases.loading import quiet
from veneer.train.language.attention import documents, register, windows

TRIAL = (7, 12)  # tokens of the two documents
PASS_BYTES = {True: 6144, False: 32768}  # tokens × bytes a number, on a CPU and elsewhere
PASS_EXTRA = {True: 32, False: 2048}  # tokens, on a CPU and elsewhere
NOISE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.bfloat16: 0.3,
    torch.float16: 0.05,
}  # of the outputs' spread: what rounding may make of it; SmolLM2's bf16 makes 0.1 of it


def packed(rows: Sequence[Sequence[int]], first: int = 0) -> dict[str, Tensor]:
    """The rows' tokens as one packed row; in each, positions begin with `first`."""
    lengths = [len(row) for row in rows]
    places = end_to_end([range(first, first + length) for length in lengths])
    return {"input_ids": end_to_end(rows), "position_ids": places, "attention_mask": documents(lengths)}


def end_to_end(rows: Sequence[Sequence[int]]) -> Tensor:
    """All numbers of the rows as one row `(1, tokens)`."""
    return torch.cat([torch.as_tensor(row, dtype=torch.long) for row in rows])[None]


def on_device(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The inputs of a model on its device; the lengths of packed documents stay where they are read."""
    stays = "attention_mask" if inputs["attention_mask"].ndim == 4 else None
    return {name: tensor if name == stays else tensor.to(device) for name, tensor in inputs.items()}


def padded(rows: Sequence[Sequence[int]], pad: int, left: bool = False) -> dict[str, Tensor]:
    """The rows' tokens, padded to the longest, on the right or on the left."""
    mask = filled([[1] * len(row) for row in rows], 0, left)
    return {"input_ids": filled(rows, pad, left), "attention_mask": mask}


def filled(rows: Sequence[Sequence[int]], fill: int, left: bool = False) -> Tensor:
    """The rows' numbers `(rows, longest)`, filled up on the right or on the left."""
    own = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(own, batch_first=True, padding_value=fill, padding_side="left" if left else "right")


def passes(lengths: Sequence[int], most: int, pads: bool) -> list[list[int]]:
    """The rows, by number, in passes of about equally many tokens, at most `most`; rows of like length go together.

    A row that is longer than that goes by itself. With `pads`, each row counts as long as the longest of its pass.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    count = max(1, -(-sum(lengths) // most))
    while True:
        found = _shared_out(order, lengths, count)
        sizes = [len(own) * lengths[own[-1]] if pads else sum(lengths[i] for i in own) for own in found]
        if all(len(own) == 1 or size <= most for own, size in zip(found, sizes, strict=True)):
            return found
        count += 1


def level_passes(lengths: Sequence[int], most: int, extra: int) -> list[list[int]]:
    """The rows, by number, in passes of like length, padded to the longest: the passes with the fewest tokens in all,
    padding included, where each pass counts `extra` tokens more, and has at most `most` unless it is one row.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    least, begins = np.zeros(len(order) + 1), [0]  # of the first rows: the fewest tokens, where their last pass begins
    for end in range(1, len(order) + 1):
        tokens = lengths[order[end - 1]] * np.arange(end, 0, -1)  # of a pass that begins at each row before
        costs = np.where((tokens <= most) | (np.arange(end) == end - 1), least[:end] + tokens + extra, np.inf)
        begins.append(int(costs.argmin()))
        least[end] = costs[begins[-1]]
    found, end = [], len(order)
    while end:
        found.append(order[begins[end] : end])
        end = begins[end]
    return found[::-1]


def extra_tokens(model: Any) -> int:
    """What a pass takes beside its tokens, in tokens: measured with small models, on a CPU; elsewhere kernels wait."""
    return PASS_EXTRA[model.device.type == "cpu"]


def most_tokens(model: Any) -> int:
    """The tokens of a pass: on a CPU fewer, for more gain little there and cost memory."""
    return PASS_BYTES[model.device.type == "cpu"] // model.dtype.itemsize


def _shared_out(order: list[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    share, done = sum(lengths) / count, 0
    found: dict[int, list[int]] = {}
    for i in order:
        found.setdefault(int((done + lengths[i] / 2) / share), []).append(i)
        done += lengths[i]
    return list(found.values())


@torch.no_grad()
def find_packing(model: Any) -> int | None:
    """The position that each document of a packed row begins with; None where the model cannot be packed.

    Afterwards a model that can be packed has veneer's attention; rows that are not packed give what they gave.
    """
    config, was_training = model.config, model.training
    most = getattr(model.get_input_embeddings(), "num_embeddings", None)
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    if most is None or config.is_encoder_decoder or config._attn_implementation != "sdpa":
        return None
    generator = torch.Generator().manual_seed(0)
    tokens = torch.arange(most)
    tokens = tokens if pad is None else tokens[tokens != pad]
    rows = [tokens[torch.randint(len(tokens), (size,), generator=generator)].tolist() for size in TRIAL]
    model.eval()
    try:
        alone = torch.cat([_outputs(model, padded([row], 0)) for row in rows])
        with quiet():
            model.set_attn_implementation(register())
        known = _knows_windows(model, rows[0], alone)
        for first in [0] if pad is None else [0, pad + 1]:  # RoBERTa's begin there
            if known and _agree(alone, _packed_outputs(model, rows, first), model.dtype):
                return first
        with quiet():
            model.set_attn_implementation("sdpa")
        return None
    finally:
        model.train(was_training)


def _outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The first output of each token, `(tokens, …)`."""
    more = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    return model(**on_device(inputs, model.device), **more)[0][0].cpu().double()  # MPS has no float64


def _knows_windows(model: Any, row: Sequence[int], alone: Tensor) -> bool:
    """Whether a row that is not packed gives what it gave, and attention is told each window that its masks have: the
    trial's documents are shorter than most.
    """
    with windows() as (masks, told):
        now = _outputs(model, padded([row], 0))
    return masks - {None, 0} <= told and _agree(alone[: len(now)], now, model.dtype)


def _packed_outputs(model: Any, rows: Sequence[Sequence[int]], first: int) -> Tensor | None:
    """What the packed row gives. None where the model does not take it or does not read the positions, or where a
    document sees another, however little: what it gives has a gradient in the other's tokens then.
    """
    embedded: list[Tensor] = []

    def leaf(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # which the model may write into

    handle = model.get_input_embeddings().register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            found = _outputs(model, packed(rows, first))
            direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
            of_each = (found * direction).flatten(1).sum(1).split(TRIAL)
            if torch.equal(_outputs(model, packed(rows, first + 1)), found):
                return None
            tokens = embedded[0]
            for i, own in enumerate(of_each):
                (grad,) = torch.autograd.grad(own.sum(), tokens, retain_graph=True)
                if any(other.any() for j, other in enumerate(grad.flatten(0, 1).split(TRIAL)) if j != i):
                    return None
        return found.detach()
    except Exception:  # whatever a model of any kind makes of such inputs, it says that it cannot be packed
        return None
    finally:
        handle.remove()


def _agree(alone: Tensor, together: Tensor | None, dtype: torch.dtype) -> bool:
    if together is None or together.shape != alone.shape:
        return False
    return bool((together - alone).pow(2).mean().sqrt() <= NOISE[dtype] * alone.std())
