"""What a model answers to prompts, and how near that is to what people wrote."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from veneer.core.errors import AdapterError
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

    Prompts of like length go through the model together, padded on the left.
    """
    refuse_empty(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = on_device(padded([prompts[i] for i in chosen], pad_of(tokenizer), left=True), model.device)
            options = {"do_sample": False, **generation}
            tokens = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_of(tokenizer),
                eos_token_id=stops_of(model, tokenizer),
                **options,
            )
            texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text.strip()
            progress(min(start + batch_size, len(order)), len(order))
    finally:
        model.train(was_training)
    return answers


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


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu defines it; any number of references an answer."""
    from sacrebleu import corpus_bleu

    most = max(len(own) for own in references)
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    return float(corpus_bleu(list(answers), streams).score)
