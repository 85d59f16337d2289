"""Reads a Llama's configuration and single tensors from safetensors (sharded too) or GGUF.

Each side asks for the tensors that it needs by transformers' parameter names; beside these only the norms and rows of
the fingerprint are read. Files are memory mapped: what is not asked for stays on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from .errors import CheckpointError
from .operations import Geometry

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
LAYER_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")

_LAYER_PREFIX = re.compile(r"^model\.layers\.\d+\.")

Progress = Callable[[int, int], None]
"""Called with how many tensors are loaded, of how many."""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def layer_name(index: int, rest: str) -> str:
    """The full name of a layer's parameter."""
    return f"model.layers.{index}.{rest}"


class Checkpoint(ABC):
    """A model's files."""

    def __init__(self, path: Path, config: LlamaConfig) -> None:
        self.path = path
        self.config = config
        self.geometry = Geometry.of(config)

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """The parameters that are in the files."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """One parameter as it is stored (float32 if that was quantised)."""

    @abstractmethod
    def read_first_row(self, name: str) -> torch.Tensor:
        """A matrix's first row, without reading the others."""

    @abstractmethod
    def _load_tokenizer(self) -> PreTrainedTokenizerBase: ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, through transformers.

        Raises:
            CheckpointError: there is none, or it can't be used.
        """
        try:
            return self._load_tokenizer()
        except Exception as error:  # transformers raises whatever a wrong file leads it to
            raise CheckpointError(f"the tokenizer of {self.path} can't be used: {_one_line(error)}") from error

    def load(
        self, names: Iterable[str], dtype: torch.dtype, device: torch.device, progress: Progress | None = None
    ) -> dict[str, torch.Tensor]:
        """The named parameters, converted and in contiguous memory of their own.

        Raises:
            CheckpointError: one is missing, or not of the shape that the configuration says.
        """
        wanted = list(names)
        present = self.names
        missing = [name for name in wanted if name not in present]
        if missing:
            raise CheckpointError(f"{self.path} lacks {len(missing)} tensors that a Llama needs, {missing[0]} first")
        loaded: dict[str, torch.Tensor] = {}
        for count, name in enumerate(wanted, start=1):
            stored = self.read(name)
            if stored.shape != self.shape(name):
                raise CheckpointError(
                    f"{self.path} has {name} of shape {list(stored.shape)}; by its configuration it is "
                    f"{list(self.shape(name))}"
                )
            loaded[name] = stored.to(device=device, dtype=dtype, copy=True).contiguous()
            if progress is not None:
                progress(count, len(wanted))
        return loaded

    def lm_head_name(self) -> str:
        """The output matrix's name: the embedding's if the two are tied."""
        return EMBEDDING if self.config.tie_word_embeddings else LM_HEAD

    def generation_config(self) -> GenerationConfig:
        """How the model's makers want it to generate: its end tokens, above all.

        Raises:
            CheckpointError: the file that says so can't be used.
        """
        return GenerationConfig.from_model_config(self.config)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that a parameter must have by the configuration."""
        g = self.geometry
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDING: (g.vocab, g.hidden),
            LM_HEAD: (g.vocab, g.hidden),
            FINAL_NORM: (g.hidden,),
            "input_layernorm.weight": (g.hidden,),
            "post_attention_layernorm.weight": (g.hidden,),
            "self_attn.q_proj.weight": (g.query_width, g.hidden),
            "self_attn.k_proj.weight": (g.kv_width, g.hidden),
            "self_attn.v_proj.weight": (g.kv_width, g.hidden),
            "self_attn.o_proj.weight": (g.hidden, g.query_width),
            "mlp.gate_proj.weight": (g.intermediate, g.hidden),
            "mlp.up_proj.weight": (g.intermediate, g.hidden),
            "mlp.down_proj.weight": (g.hidden, g.intermediate),
        }
        within_layer = _LAYER_PREFIX.sub("", name)
        if within_layer.endswith(".bias"):
            return shapes[within_layer.removesuffix("bias") + "weight"][:1]
        return shapes[within_layer]

    def fingerprint(self) -> str:
        """Names the model whatever its file format: a digest of its sizes, its norms and a row of each layer.

        Two checkpoints of one model at different quantisations differ.
        """
        digest = hashlib.sha256(repr((self.geometry, self._arithmetic())).encode())
        layers = range(self.geometry.layers)
        norms = [layer_name(index, norm) for index in layers for norm in LAYER_NORMS]
        rows = [layer_name(index, "mlp.down_proj.weight") for index in layers]
        for name in [FINAL_NORM, *norms]:
            digest.update(self.read(name).to(torch.float32).numpy().tobytes())
        for name in [EMBEDDING, *rows]:
            digest.update(self.read_first_row(name).to(torch.float32).numpy().tobytes())
        return digest.hexdigest()[:32]

    def _arithmetic(self) -> list[tuple[str, str]]:
        """What the configuration says beside sizes, with numbers as exact as every file format keeps them."""
        rope = self.config.rope_parameters
        values = {"act": self.config.hidden_act, "eps": self.config.rms_norm_eps, **rope}
        return [
            (key, f"{value:.6g}" if isinstance(value, float) else str(value)) for key, value in sorted(values.items())
        ]


class SafetensorsCheckpoint(Checkpoint):
    """A directory as transformers saves it."""

    def __init__(self, path: Path, config: LlamaConfig) -> None:
        super().__init__(path, config)
        index = path / "model.safetensors.index.json"
        try:
            if index.exists():
                shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
                files = {shard: self._open(path / shard) for shard in sorted(set(shards.values()))}
                self._files = {name: files[shard] for name, shard in shards.items()}
            else:
                file = self._open(path / "model.safetensors")
                self._files = dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the safetensors files in {path} can't be read: {error}") from error

    @staticmethod
    def _open(file: Path) -> Any:
        return safe_open(str(file), framework="pt")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def read_first_row(self, name: str) -> torch.Tensor:
        row: torch.Tensor = self._files[name].get_slice(name)[0:1]
        return row

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)

    def generation_config(self) -> GenerationConfig:
        if not (self.path / "generation_config.json").is_file():
            return super().generation_config()
        try:
            return GenerationConfig.from_pretrained(self.path)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"the generation_config.json in {self.path} can't be used: {_one_line(error)}"
            ) from error


_GGUF_GLOBAL_NAMES = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": LM_HEAD,
}
_GGUF_LAYER_NAMES = {
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


class GgufCheckpoint(Checkpoint):
    """One GGUF file of a Llama, of any quantisation that the gguf package can undo."""

    def __init__(self, path: Path) -> None:
        try:
            reader = gguf.GGUFReader(str(path))
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise CheckpointError(f"{path} is no readable GGUF file: {error}") from error
        self._tensors = {self._translate(tensor.name): tensor for tensor in reader.tensors}
        super().__init__(path, self._read_config(reader))

    @staticmethod
    def _translate(name: str) -> str:
        """The name that transformers gives a GGUF tensor; one that it does not have stays as it is."""
        if name in _GGUF_GLOBAL_NAMES:
            return _GGUF_GLOBAL_NAMES[name]
        parts = name.split(".")
        if len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in _GGUF_LAYER_NAMES:
            return layer_name(int(parts[1]), f"{_GGUF_LAYER_NAMES[parts[2]]}.{parts[3]}")
        return name

    def _read_config(self, reader: Any) -> LlamaConfig:
        """The configuration that transformers reads from the same file, without its decoding of the vocabulary."""

        def field(name: str, default: Any = None) -> Any:
            found = reader.get_field(name)
            return default if found is None else found.contents()

        architecture = field("general.architecture")
        if architecture != "llama":
            raise CheckpointError(
                f"{self._described(architecture)}; only Llama models (architecture llama) are supported"
            )
        scaling = field("llama.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self._tensors:
            raise CheckpointError(
                "the GGUF file scales its rotary positions (as Llama 3.1 does), which is not read from GGUF: "
                "use the model's safetensors files"
            )
        try:
            heads = field("llama.attention.head_count")
            hidden = field("llama.embedding_length")
            return LlamaConfig(
                num_hidden_layers=field("llama.block_count"),
                max_position_embeddings=field("llama.context_length"),
                hidden_size=hidden,
                intermediate_size=field("llama.feed_forward_length"),
                num_attention_heads=heads,
                num_key_value_heads=field("llama.attention.head_count_kv", heads),
                head_dim=field("llama.rope.dimension_count", hidden // heads),
                rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
                rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base", 10000.0)},
                vocab_size=int(self._tensors[EMBEDDING].shape[1]),
                bos_token_id=field("tokenizer.ggml.bos_token_id"),
                eos_token_id=field("tokenizer.ggml.eos_token_id"),
                pad_token_id=field("tokenizer.ggml.padding_token_id"),
                unk_token_id=field("tokenizer.ggml.unknown_token_id"),
                attention_bias=layer_name(0, "self_attn.q_proj.bias") in self._tensors,
                mlp_bias=layer_name(0, "mlp.gate_proj.bias") in self._tensors,
                tie_word_embeddings=LM_HEAD not in self._tensors,
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"the GGUF file's description of its Llama is incomplete: {error}") from error

    @staticmethod
    def _described(architecture: Any) -> str:
        return f"the GGUF file holds a model of architecture {architecture!r}"

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            values = self._in_transformers_row_order(values, self.geometry.heads)
        elif name.endswith(("k_proj.weight", "k_proj.bias")):
            values = self._in_transformers_row_order(values, self.geometry.kv_heads)
        return torch.from_numpy(np.array(values, copy=True))

    def read_first_row(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        return torch.from_numpy(np.array(gguf.dequantize(tensor.data[:1], tensor.tensor_type), copy=True))

    @staticmethod
    def _in_transformers_row_order(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
        """GGUF keeps the two halves of each rotary pair adjacent, transformers a head apart."""
        pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        return np.asarray(pairs.swapaxes(1, 2).reshape(values.shape))

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name, trust_remote_code=False)


def open_checkpoint(path_or_hub_id: str, gguf_file: str | None = None) -> Checkpoint:
    """Open a model: a directory, a GGUF file, or a hub id (fetched through huggingface_hub if it is not cached).

    Raises:
        CheckpointError: it is not there, not readable, or no Llama.
    """
    try:
        checkpoint = _open(path_or_hub_id, gguf_file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"the model at {path_or_hub_id!r} can't be read: {_one_line(error)}") from error
    if checkpoint.config.hidden_act not in ACT2FN:
        raise CheckpointError(f"{checkpoint.path} has the unknown activation {checkpoint.config.hidden_act!r}")
    return checkpoint


def _open(path_or_hub_id: str, gguf_file: str | None) -> Checkpoint:
    path = Path(path_or_hub_id).expanduser()
    if not path.exists():
        path = _fetch(path_or_hub_id, gguf_file)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is neither a directory nor a .gguf file")
        return GgufCheckpoint(path)
    if gguf_file is None and not any(path.glob("*.safetensors")):
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise CheckpointError(f"{path} holds {len(files)} GGUF files: name one ({files[0].name}, …)")
        gguf_file = files[0].name if files else None
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise CheckpointError(f"{path} holds no file {gguf_file}")
        return GgufCheckpoint(path / gguf_file)
    return SafetensorsCheckpoint(path, _read_config(path))


def _read_config(path: Path) -> LlamaConfig:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds neither config.json nor a .gguf file: is it a model's directory?")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a wrong file leads it to
        raise CheckpointError(f"the config.json in {path} can't be used: {_one_line(error)}") from error
    if type(config) is not LlamaConfig:
        raise CheckpointError(
            f"{path} holds a model of type {config.model_type!r}; only Llama models (model_type llama) are supported"
        )
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path} holds no safetensors files: save the model with save_pretrained first")
    return config


def _fetch(hub_id: str, gguf_file: str | None) -> Path:
    """A hub model's directory in the local cache, fetched if it must be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"] if gguf_file is None else ["*.json", gguf_file]
    if hub_id.count("/") == 1 and not hub_id.startswith((".", "/", "~")):
        with contextlib.suppress(HFValidationError, LocalEntryNotFoundError, OSError):
            return Path(snapshot_download(hub_id, allow_patterns=patterns))
    raise CheckpointError(f"no model at {hub_id!r}: it is no path here, and no model hub gave it")
