"""Sizes of tiny genuine models, and a tokenizer for them."""

from functools import cache

TEXTS = ["The cat sat on the mat.", "Name an inn: The Golden Inn is a pub.", "What is 12 + 30? It is 42, said she."]
SPECIALS = ["<pad>", "<s>", "</s>"]
PARTS = {
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    },
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
}


@cache
def tokenizer_with(specials: tuple[str, ...], begin: bool = False, end: bool = False, template: str | None = None):
    """A byte-level BPE tokenizer with these special tokens more; texts begin with <s>, or end with </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, every = pre_tokenizers.ByteLevel.alphabet(), [*SPECIALS, *specials]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=every, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS * 5, trainer)
    around = f"{'<s> ' * begin}$A{' </s>' * end}"
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
