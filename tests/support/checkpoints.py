"""Making checkpoints of small models, changing them, and judging what is read."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llama_split import CheckpointError
from llama_split.checkpoint import (
    LM_HEAD,
    Checkpoint,
    open_checkpoint,
)
from tests.support.llamas import Small

CPU = torch.device("cpu")


def needed(checkpoint: Checkpoint) -> set[str]:
    """Every parameter of the model by transformers' names; a tied output matrix is the embedding."""
    with torch.device("meta"):
        names = set(LlamaForCausalLM(checkpoint.config).state_dict())
    return names - {LM_HEAD} if checkpoint.config.tie_word_embeddings else names


def assert_equal_to(checkpoint: Checkpoint, model: LlamaForCausalLM) -> None:
    state = model.state_dict()
    loaded = checkpoint.load(needed(checkpoint), torch.float32, CPU)
    assert set(loaded) == needed(checkpoint)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.is_contiguous()
        middle = len(tensor) // 2 - 1
        for start, stop in ((0, 1), (0, middle), (middle, len(tensor))):
            assert torch.equal(checkpoint.rows(name, start, stop), state[name][start:stop]), name


def changed(small: Small, directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model with other weights in its file."""
    shutil.copytree(small.path, directory, dirs_exist_ok=True)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


Tensors = dict[str, torch.Tensor]


def edit_config(directory: Path, **changes: Any) -> None:
    """Change a model's configuration; a value of ``...`` removes the field."""
    file = directory / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def refusal(path: Path | str, **options: Any) -> str:
    """The one line that says why a model can't be opened."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path), **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def as_gguf(
    model: LlamaForCausalLM,
    path: Path,
    architecture: str = "llama",
    kind: Kind = Kind.F32,
    more: Callable[[gguf.GGUFWriter], None] = lambda _writer: None,
    leave_out: str | None = None,
) -> Path:
    """Write a model as llama.cpp's converter does: matrices of ``kind``, what ``more`` adds, not the one left out."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_bos_token_id(1)
    for name, tensor in model.state_dict().items():
        if name == LM_HEAD and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        stem, suffix = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, index, part = stem.split(".", 3)
            stem = f"blk.{index}.{GGUF_NAMES[part]}"
        else:
            stem = GGUF_NAMES[stem]
        if stem == leave_out:
            continue
        values = np.ascontiguousarray(values)
        if values.ndim == 1 or kind is Kind.F32:
            writer.add_tensor(f"{stem}.{suffix}", values)
        else:
            writer.add_tensor(f"{stem}.{suffix}", gguf.quantize(values, kind), raw_dtype=kind)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Within the block transformers parses a GGUF file once, not for each use: a vocabulary takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        yield


def status(field: str) -> int:
    """A figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def growth_of_peak(action: Callable[[], object]) -> int:
    """By how many bytes resident memory, mapped files included, grew at its highest while something was done."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what other tests have freed would be taken again, and no growth be seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    action()
    return status("VmHWM") - before
