"""The names of packed weights, which are the kernels' parameters. Imports no torch."""

_PARAMETERS = {
    "input_layernorm.weight": "input_norm",
    "self_attn.q_proj.weight": "wq",
    "self_attn.q_proj.bias": "bq",
    "self_attn.k_proj.weight": "wk",
    "self_attn.k_proj.bias": "bk",
    "self_attn.v_proj.weight": "wv",
    "self_attn.v_proj.bias": "bv",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "self_attn.o_proj.weight": "wo",
    "self_attn.o_proj.bias": "bo",
    "post_attention_layernorm.weight": "post_norm",
    "mlp.gate_proj.weight": "w_gate",
    "mlp.gate_proj.bias": "b_gate",
    "mlp.up_proj.weight": "w_up",
    "mlp.up_proj.bias": "b_up",
    "mlp.down_proj.weight": "w_down",
    "mlp.down_proj.bias": "b_down",
}
"""Maps a layer's weight names in Hugging Face checkpoints to the layer kernels' parameters."""
WHOLE = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "lm_head",
}


def packed_name(name: str) -> str:
    """The packed name of a weight of the checkpoint."""
    if name in WHOLE:
        return WHOLE[name]
    layer, _, tensor = name.removeprefix("model.layers.").partition(".")
    return f"layers.{layer}.{_PARAMETERS[tensor]}"
