"""What a layer does in its model, told from its path."""

import re

# (role, what the end of a path looks like), the first that fits; the names are those of diffusers and transformers
_ENDS = (
    ("norm", r"\w*[Nn]orm\w*(\.(\d+|linear))?|ln_\w+"),
    ("time embedding", r"(time_emb\w*|add_embedding|time_text_embed|timestep_embedder|guidance_embedder)(\.\w+)*"),
    ("embedding", r"\w*embed(dings?|_tokens|_in|_positions|der)?|wte|wpe|shared|patch_embeddings\.projection"),
    ("head", r"lm_head|score|classifier(\.\w+)*|qa_outputs|embed_out|cls(\.\w+)*|pre_classifier|pooler\.dense|head"),
    ("feed-forward", r"(ff|ff_context|feed_forward|mlp|experts|DenseReluDense|ffn|shared_expert)(\.\w+)+"),
    ("feed-forward", r"fc1|fc2|fc_in|fc_out|lin1|lin2|gate_proj|up_proj|down_proj|intermediate\.dense|proj_mlp"),
    ("attention out", r"(self_attention|attention|attention\.output|attn)\.(dense|proj|c_proj)"),
    ("feed-forward", r"output\.dense"),
    ("convolution", r"(conv\w*|channelwise|depthwise)(\.\w+)*"),
    ("attention qkv", r"c_attn|qkv|qkv_proj|to_qkv|query_key_value|in_proj(_weight)?|Wqkv"),
    ("attention q", r"to_q|q_proj|q_lin|query|query_proj|add_q_proj|q|q_a_proj|q_b_proj"),
    ("attention k", r"to_k|k_proj|k_lin|key|key_proj|add_k_proj|k"),
    ("attention v", r"to_v|v_proj|v_lin|value|value_proj|add_v_proj|v"),
    ("attention out", r"to_out(\.0)?|o_proj|out_proj|out_lin|to_add_out|o"),
    ("projection", r"proj_in|proj_out|projection|(\w+_)?mapper(\.\d+)?|(\w+_)?proj(ection)?"),
)
_ROLES = tuple((role, re.compile(rf"(?:.*\.)?(?:{end})")) for role, end in _ENDS)
_CROSS = re.compile(r"(^|\.)(attn2|encoder_attn|crossattention|cross_attn|EncDecAttention)\.")
_PARAMETER = re.compile(r"\.(weight|bias)$")
_ATTENTION = tuple(
    f"{which} {side}" for which in ("attention", "cross-attention") for side in ("q", "k", "v", "qkv", "out")
)
ROLES = (*_ATTENTION, *dict.fromkeys(role for role, _ in reversed(_ENDS) if not role.startswith("attention")), "other")


def role_of(path: str) -> str:
    """`attention q`, `cross-attention k`, `feed-forward`, `convolution`, …; `other` for what no name tells."""
    path = _PARAMETER.sub("", path)
    role = next((role for role, end in _ROLES if end.fullmatch(path)), "other")
    return f"cross-{role}" if role.startswith("attention") and _CROSS.search(path) else role
