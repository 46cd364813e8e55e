"""What a model answers to prompts, and how near that is to what people wrote."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


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
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = _left_padded([prompts[i] for i in chosen], pad_of(tokenizer), model.device)
            options = {"do_sample": False, **generation}
            tokens = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_of(tokenizer),
                **options,
            )
            texts = tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
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


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu defines it; any number of references an answer."""
    from sacrebleu import corpus_bleu

    most = max(len(own) for own in references)
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    return float(corpus_bleu(list(answers), streams).score)


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)  # (rows, tokens)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)
