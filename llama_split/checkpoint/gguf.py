"""Checkpoints in GGUF files, with names, configuration and row order translated to transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

from ..errors import CheckpointError
from .base import Checkpoint
from .files import check_file, check_tokenizer_files, one_line
from .gguf_file import GgufFile, SkippedArray, StoredTensor, readable
from .gguf_names import translated
from .gguf_rope import FREQUENCY_FACTORS, rope_parameters
from .outline import EMBEDDING, LM_HEAD
from .soundness import check_values

_ENDS = ("eos", "eot", "eom")
"""End of a text, of a turn, of a message: each ends a generation."""
# Dequantising allocates several temporary arrays of this many numbers; at this size they stay in a core's cache.
_NUMBERS_AT_ONCE = 1 << 16


class GgufCheckpoint(Checkpoint):
    """One GGUF file of a Llama, in any quantisation that the gguf package can decode.

    Raises:
        CheckpointError: it can't be read, is one part of several, no Llama, or has an unknown scaling of rotary
            positions; or as for ``Checkpoint``.
    """

    def __init__(self, path: Path) -> None:
        check_file(path)
        try:
            self._file = GgufFile(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is no readable GGUF file: {one_line(error)}") from error
        self.path = path
        self._refuse_part()
        self._tensors = {translated(name): tensor for name, tensor in self._file.tensors.items()}
        super().__init__(path, self._read_config())

    def _refuse_part(self) -> None:
        parts, before = self._file.fields.get("split.count", 1), self._file.fields.get("split.no", 0)
        if parts != 1:
            number = before + 1 if isinstance(before, int) else before
            raise CheckpointError(
                f"{self.path} is part {number} of {parts} of a split GGUF file: join them with "
                "`llama-gguf-split --merge`"
            )

    def _field(self, name: str, default: Any = None) -> Any:
        value = self._file.fields.get(name, default)
        if isinstance(value, SkippedArray):
            raise CheckpointError(f"{self.path} has a {name} for each layer; only Llamas of equal layers are supported")
        return value

    def _read_config(self) -> LlamaConfig:
        """The configuration that transformers reads from the same file, without decoding the vocabulary."""
        field = self._field
        architecture = field("general.architecture")
        if architecture != "llama":
            raise CheckpointError(
                f"{self.path} holds a model of architecture {architecture!r}; "
                "only Llama models (architecture llama) are supported"
            )
        if field("llama.expert_count", 0):
            raise CheckpointError(f"{self.path} holds a mixture of experts; only dense Llama models are supported")
        try:
            heads = field("llama.attention.head_count")
            context = field("llama.context_length")
            sizes = {
                "num_hidden_layers": field("llama.block_count"),
                "max_position_embeddings": context,
                "hidden_size": field("llama.embedding_length"),
                "intermediate_size": field("llama.feed_forward_length"),
                "num_attention_heads": heads,
                "num_key_value_heads": field("llama.attention.head_count_kv", heads),
                "vocab_size": self._tensors[EMBEDDING].shape[0],
            }
            check_values(self.path, sizes)
            head_dim = self._head_dim(sizes["hidden_size"] // heads)
            check_values(self.path, {"head_dim": head_dim})
            return LlamaConfig(
                **sizes,
                head_dim=head_dim,
                rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
                rope_parameters=rope_parameters(self.path, field, self._frequency_factors(), head_dim, context),
                bos_token_id=field("tokenizer.ggml.bos_token_id"),
                eos_token_id=field("tokenizer.ggml.eos_token_id"),
                pad_token_id=field("tokenizer.ggml.padding_token_id"),
                unk_token_id=field("tokenizer.ggml.unknown_token_id"),
                attention_bias=self._has_bias("self_attn"),
                mlp_bias=self._has_bias("mlp"),
                tie_word_embeddings=LM_HEAD not in self._tensors,
            )
        except CheckpointError:
            raise
        except Exception as error:  # wrong sizes may raise anything in transformers
            raise CheckpointError(
                f"{self.path} describes its Llama incompletely or wrongly: {one_line(error)}"
            ) from error

    def _has_bias(self, part: str) -> bool:
        """True if any linear layer of this part of a layer has a bias: in transformers all have one or none."""
        return any(f".{part}." in name and name.endswith("_proj.bias") for name in self._tensors)

    def _head_dim(self, default: int) -> int:
        """The width of a head, which must be rotated as a whole."""
        rotated: int = self._field("llama.rope.dimension_count", default)
        for name in ("llama.attention.key_length", "llama.attention.value_length"):
            if self._field(name, rotated) != rotated:
                raise CheckpointError(
                    f"{self.path} has {name} {self._field(name)} and rotates {rotated} numbers of each head; "
                    "only Llamas with one width for all of these are supported"
                )
        return rotated

    def _frequency_factors(self) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        stored = self._tensors.get(FREQUENCY_FACTORS)
        return None if stored is None else self._dequantised(FREQUENCY_FACTORS, self._file.rows(stored)).reshape(-1)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def rows(self, name: str, start: int, stop: int, step: int = 1) -> torch.Tensor:
        stored = self._tensors[name]
        data = self._file.rows(stored)
        order = self._rows_in_file(name, start, stop, step)
        if len(stored.shape) == 1:  # a vector is short, and one row of the file
            values = self._dequantised(name, data).reshape(-1)[order]
        else:
            values = self._dequantised(name, data[order])
        self._file.let_go(stored)
        return torch.from_numpy(values)

    def _rows_in_file(self, name: str, start: int, stop: int, step: int) -> Any:
        """Where these rows are in the file: it keeps rotary pairs adjacent, transformers half a head apart."""
        if ".q_proj." not in name and ".k_proj." not in name:
            return slice(start, stop, step)
        rows, half = np.arange(start, stop, step), self.geometry.head_dim // 2
        head, within = np.divmod(rows, 2 * half)
        return head * 2 * half + within % half * 2 + within // half

    def _dequantised(
        self, name: str, data: np.ndarray[Any, np.dtype[np.uint8]]
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Rows of bytes as rows of float32, in memory of their own."""
        stored: StoredTensor = self._tensors[name]
        values = np.empty((len(data), stored.shape[-1]), np.float32)
        step = max(1, _NUMBERS_AT_ONCE // stored.shape[-1])
        for start in range(0, len(data), step):
            # As one long row: the gguf package takes sixteen rows at a time, which is slow if they are short.
            block = data[start : start + step].reshape(1, -1)
            values[start : start + step] = gguf.dequantize(block, stored.quantisation).reshape(-1, stored.shape[-1])
        return values

    def _unreadable(self, name: str) -> str | None:
        found, known = self._tensors[name].quantisation.name, readable()
        if found in known:
            return None
        return f"{found}, which the gguf package can't read; it reads {', '.join(known)}"

    def _stored_dtype(self) -> torch.dtype:
        """Dequantised numbers are float32."""
        return torch.float32

    def _load_generation_config(self) -> GenerationConfig:
        found = super()._load_generation_config()
        named = (self._field(f"tokenizer.ggml.{end}_token_id") for end in _ENDS)
        ends = list(dict.fromkeys(end for end in named if end is not None))
        if len(ends) > 1:
            found.eos_token_id = ends
        return found

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        check_tokenizer_files(self.path.parent)
        return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name, trust_remote_code=False)
