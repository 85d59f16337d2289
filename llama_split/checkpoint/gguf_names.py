"""Translates the names of a GGUF file's tensors to transformers'."""

from __future__ import annotations

import re

from .outline import EMBEDDING, FINAL_NORM, LM_HEAD, layer_name

_GLOBAL_NAMES = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": LM_HEAD,
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,9})\.([a-z_]+)\.(weight|bias)")


def translated(name: str) -> str:
    """Transformers' name for a GGUF tensor; a name that is not known stays as it is."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    found = _LAYER_TENSOR.fullmatch(name)
    if found is not None and found[2] in _LAYER_NAMES:
        return layer_name(int(found[1]), f"{_LAYER_NAMES[found[2]]}.{found[3]}")
    return name
