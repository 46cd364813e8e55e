"""Answers to several prompts at once are those to each alone."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.train.language.answers import answer

PROMPTS = [[5, 9, 4], [7, 3, 8, 6, 11], [4]]


@pytest.mark.parametrize("beams", [1, 2])
def test_an_output_layer_is_given_one_piece_of_memory(base_of, beams):
    folder = base_of("llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = []
    with model.lm_head.register_forward_hook(lambda _, args, output: given.append(args[0])):
        together = answer(model, tokenizer, PROMPTS, 4, num_beams=beams, min_new_tokens=4)
    assert len(given) >= 4
    assert all(x.is_contiguous() and len(x) in (len(PROMPTS), beams * len(PROMPTS)) for x in given)
    assert together == [
        answer(model, tokenizer, [prompt], 4, num_beams=beams, min_new_tokens=4)[0] for prompt in PROMPTS
    ]
    assert not model.lm_head._forward_pre_hooks
