"""What a model answers to prompts."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from veneer.core.errors import AdapterError
from veneer.train.bases.loading import quiet
from veneer.train.language.packing import on_device, padded


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 25,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **generation: Any,
) -> list[str]:
    """The model's answer to each prompt (token ids), greedy unless `generation` says otherwise.

    Prompts of like length go through the model together; those of a decoder are padded on the left, for it goes on
    behind them, and those of an encoder on the right.
    """
    refuse_empty(prompts)
    goes_on = not model.config.is_encoder_decoder
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = on_device(padded([prompts[i] for i in chosen], pad_of(tokenizer), left=goes_on), model.device)
            options = {"do_sample": False, "num_beams": 1, **generation}
            # quiet of a base's own settings, which these replace
            with quiet(), _whole_inputs(model.get_output_embeddings()):
                tokens = model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad_of(tokenizer),
                    eos_token_id=stops_of(model, tokenizer),
                    **options,
                )
            begin = inputs["input_ids"].shape[1] if goes_on else 0
            texts = tokenizer.batch_decode(tokens[:, begin:], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text.strip()
            progress(min(start + batch_size, len(order)), len(order))
    finally:
        model.train(was_training)
    return answers


def _whole_inputs(head: nn.Module | None) -> AbstractContextManager[Any]:
    """Inside, what the output layer is given lies in one piece: of the last places of several rows, which do not, a CPU
    would make a copy of the weight for each row (1.4 GB for 25 rows of SmolLM2).
    """
    if head is None:
        return nullcontext()
    return head.register_forward_pre_hook(lambda _, args: tuple(x.contiguous() for x in args))


def pad_of(tokenizer: Any) -> int:
    """The id that fills up rows; it is never read."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if found is None else int(found)


def stops_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's own, and the one that training puts behind a completion."""
    own = model.generation_config.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({int(end) for end in ends if end is not None})


def refuse_empty(prompts: Sequence[Sequence[int]]) -> None:
    """A model cannot answer nothing. Raises `AdapterError`."""
    if empty := [i + 1 for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise AdapterError(f"prompt {', '.join(map(str, empty[:8]))} is empty: expected at least one token")
