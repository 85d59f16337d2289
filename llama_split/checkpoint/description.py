"""Describes a model for ``llama-split info`` without torch and transformers, whose import takes seconds.

Only a model about which nothing is in doubt is described here: a plain Llama whose files state every size, with
parameters of exactly these shapes. For every other model ``describe`` opens it as the other commands do, which decides
as transformers does and explains what is wrong. A test holds that both give the same description.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..boundary.geometry import Geometry
from ..errors import CheckpointError
from .files import check_file, read_object
from .outline import EMBEDDING, FOREIGN, LAYER_PREFIX, LM_HEAD, Outline, parameter_shape
from .shapes import shape_values

_LIMIT = 1 << 31
_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings"),
)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_NUMBER = (int, float)
_ID = (int, type(None))
_PLAIN_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_SIZES, (int,)),
    **dict.fromkeys(
        ("_name_or_path", "model_type", "hidden_act", "transformers_version", "dtype", "torch_dtype"), (str,)
    ),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache"), (bool,)),
    **dict.fromkeys(("initializer_range", "attention_dropout", "rms_norm_eps", "rope_theta"), _NUMBER),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _ID),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), (dict, type(None))),
    "architectures": (list, type(None)),
    "pretraining_tp": (int,),
}
"""The fields of a plain Llama's config.json. A field that is not among them may change anything."""
_DTYPES = ("float32", "bfloat16", "float16", None)
_LLAMA3_ROPE = {"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


@dataclass(frozen=True)
class Description:
    """A model as far as ``llama-split info`` needs it; ``positions`` is the most tokens of a text."""

    path: Path
    outline: Outline
    positions: int


def describe(name: str, seed: int | None) -> Description:
    """Describe the model that ``open_checkpoint`` opens; with a seed, the shape of this name with random weights.

    Raises:
        CheckpointError: there is no such model, or none that can be split.
    """
    if seed is not None:
        values = shape_values(name)
        head = EMBEDDING if values["tie_word_embeddings"] else LM_HEAD
        path = Path(f"{name} with random weights, seed {seed}")
        outline = Outline(Geometry.of_values(values), attention_bias=False, mlp_bias=False, lm_head=head)
        return Description(path, outline, values["max_position_embeddings"])
    found = quick_description(Path(name).expanduser())
    if found is not None:
        return found
    from .opening import open_checkpoint

    checkpoint = open_checkpoint(name)
    return Description(checkpoint.path, checkpoint.outline, checkpoint.config.max_position_embeddings)


def quick_description(path: Path) -> Description | None:
    """Describe a model without transformers; None if that takes a closer look."""
    try:
        if path.is_dir() and (path / "config.json").exists() and any(path.glob("*.safetensors")):
            return _of_directory(path)
        if path.suffix == ".gguf" and path.is_file():
            return _of_gguf(path)
    except (CheckpointError, OSError, ValueError, LookupError, TypeError, ArithmeticError):
        pass  # opening it explains what is wrong
    return None


def _of_directory(path: Path) -> Description | None:
    values = read_object(path / "config.json")
    if not all(type(value) in _PLAIN_FIELDS.get(field, ()) for field, value in values.items()):
        return None
    if (values["model_type"], values["hidden_act"]) != ("llama", "silu") or (path / "adapter_config.json").exists():
        return None
    if not {values.get("dtype"), values.get("torch_dtype")} <= set(_DTYPES):
        return None
    values = {"head_dim": values["hidden_size"] // values["num_attention_heads"], **values}
    if not _is_plain(values, values["rms_norm_eps"]) or not _is_plain_rope(values):
        return None
    if (path / _SINGLE).exists():
        files = [path / _SINGLE]
    else:
        files = [path / file for file in sorted(set(read_object(path / _INDEX)["weight_map"].values()))]
    if any(file.parent != path for file in files):
        return None
    shapes = _stored_shapes(files)
    biases = [values.get(field, False) for field in ("attention_bias", "mlp_bias")]
    return _described(path, values, shapes, *biases, tied=values.get("tie_word_embeddings", False))


def _stored_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in safetensors files.

    Raises:
        ValueError: a file can't be read, or a tensor is quantised.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for file in files:
            with safe_open(str(check_file(file)), framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118 - no dict
                    stored = opened.get_slice(name)
                    if stored.get_dtype() not in _FLOATS:
                        raise ValueError(f"{name} is quantised")
                    shapes[name] = tuple(stored.get_shape())
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return shapes


def _of_gguf(path: Path) -> Description | None:
    from .gguf_file import GgufFile, readable
    from .gguf_names import translated

    file = GgufFile(check_file(path))
    fields = file.fields
    if fields["general.architecture"] != "llama" or fields.get("llama.expert_count") or "split.count" in fields:
        return None
    if any(name.startswith("llama.rope.scal") for name in fields) or "rope_freqs.weight" in file.tensors:
        return None
    if not all(tensor.quantisation.name in readable() for tensor in file.tensors.values()):
        return None
    theta = fields.get("llama.rope.freq_base", 10000.0)
    shapes = {translated(name): tensor.shape for name, tensor in file.tensors.items()}
    heads = fields["llama.attention.head_count"]
    head_dim = fields.get("llama.rope.dimension_count", fields["llama.embedding_length"] // heads)
    values = {
        "num_hidden_layers": fields["llama.block_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "vocab_size": shapes[EMBEDDING][0],
        "head_dim": head_dim,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    widths = {fields.get(f"llama.attention.{which}_length", head_dim) for which in ("key", "value")}
    if not _is_plain(values, fields["llama.attention.layer_norm_rms_epsilon"]) or widths != {head_dim}:
        return None
    if not _is_positive(theta):
        return None
    biases = [
        any(f".{part}." in name and name.endswith("_proj.bias") for name in shapes) for part in ("self_attn", "mlp")
    ]
    return _described(path, values, shapes, *biases, tied=LM_HEAD not in shapes)


def _described(
    path: Path,
    values: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    attention_bias: bool,
    mlp_bias: bool,
    *,
    tied: bool,
) -> Description | None:
    """The description, if the files hold the parameters that these values ask for, and none that change others."""
    head = EMBEDDING if tied and LM_HEAD not in shapes else LM_HEAD
    outline = Outline(Geometry.of_values(values), attention_bias, mlp_bias, head)
    layers = {match[1] for match in map(LAYER_PREFIX.match, shapes) if match}
    if len(layers) < outline.geometry.layers or any(map(FOREIGN.match, shapes)):
        return None
    if any(shapes.get(name) != parameter_shape(outline.geometry, name) for name in outline.parameters()):
        return None
    return Description(path, outline, values["max_position_embeddings"])


def _is_plain(values: Mapping[str, Any], epsilon: Any) -> bool:
    """True if all sizes are stated and fit each other, and the padding token is one of the model's."""
    sizes = [values.get(name) for name in _SIZES]
    if not all(type(size) is int and 1 <= size < _LIMIT for size in sizes):
        return False
    padding = values.get("pad_token_id")
    return bool(
        values["num_attention_heads"] % values["num_key_value_heads"] == 0
        and values["head_dim"] % 2 == 0
        and (padding is None or (type(padding) is int and 0 <= padding < values["vocab_size"]))
        and type(epsilon) in (int, float)
        and math.isfinite(epsilon)
        and epsilon >= 0
    )


def _is_plain_rope(values: Mapping[str, Any]) -> bool:
    """True for positions that are not scaled, and for Llama 3's scaling with all of its numbers."""
    if values.get("rope_parameters") and values.get("rope_scaling"):
        return False
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    named = {"rope_theta": values.get("rope_theta", 10000.0), **rope}
    kind = named.pop("rope_type", "default")
    wanted = {"rope_theta"} if kind == "default" else _LLAMA3_ROPE
    if kind not in ("default", "llama3") or named.keys() != wanted or not all(map(_is_positive, named.values())):
        return False
    return kind == "default" or bool(named["high_freq_factor"] > named["low_freq_factor"])


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0
