"""What every kind of checkpoint can do: name its tensors, give rows of them, load them, and be told from others."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

from ..errors import CheckpointError
from ..operations import Geometry
from .files import one_line
from .generation import check_generation_config
from .soundness import check_config, check_rotary

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
LAYER_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")

_ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
_MLP = tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))

BLOCK_NUMBERS = 1 << 20
"""How many numbers are read and converted at a time: 4 MiB in float32, however large the tensor is.

torch joins its threads after each block, which is slow where they spin on busy cores: hence none much smaller.
"""

SAMPLED_ROWS = 16
SAMPLED_NUMBERS = 1 << 15
"""What a fingerprint reads of each matrix: so many rows, or as many as have so many numbers, if these are more."""

_LAYER_PREFIX = re.compile(r"^model\.layers\.(0|[1-9][0-9]{0,9})\.")
# What a linear layer or the embedding has beside its weight and bias: scales of a quantisation, parts of an adapter.
_FOREIGN_PART = re.compile(
    r"^(model\.embed_tokens|lm_head|model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj)"
    r"\.(?!weight$|bias$)"
)

Key = TypeVar("Key")

Progress = Callable[[int, int], None]
"""Called with how many tensors are loaded, of how many."""


def layer_name(index: int, rest: str) -> str:
    """The full name of a layer's parameter."""
    return f"model.layers.{index}.{rest}"


class Checkpoint(ABC):
    """A model's files, found to hold all that their configuration asks for.

    A subclass must be able to describe its tensors before it calls this ``__init__``.

    Raises:
        CheckpointError: the configuration describes no Llama that can be computed; or a tensor is missing, of another
            shape than the configuration says, or stored in a way that can't be read.
    """

    def __init__(self, path: Path, config: LlamaConfig) -> None:
        self.path = path
        self.config = config
        check_config(path, config)
        # transformers' own name for this public choice. A split attends by its own steps, whatever the file names.
        config._attn_implementation = "sdpa"  # noqa: SLF001
        self.geometry = Geometry.of(config)
        self._check_layers()
        self._check_parts()
        self._check(self.parameters())
        check_rotary(path, config)
        self.dtype = self._stored_dtype() if config.dtype is None else config.dtype

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """The parameters that are in the files."""

    @abstractmethod
    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape that a parameter has in the files; nothing of it is read."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int, step: int = 1) -> torch.Tensor:
        """Rows (of a vector: elements) of one parameter as they are stored (float32 if that was quantised).

        The result may be a view of the file: whoever keeps it copies it.
        """

    @abstractmethod
    def _unreadable(self, name: str) -> str | None:
        """Why a stored parameter can't be read as the numbers that the model was made with; None if it can."""

    @abstractmethod
    def _stored_dtype(self) -> torch.dtype:
        """The dtype of the weights in the files, where the configuration names none."""

    @abstractmethod
    def _load_tokenizer(self) -> PreTrainedTokenizerBase: ...

    def read(self, name: str) -> torch.Tensor:
        """One whole parameter as it is stored (float32 if that was quantised)."""
        return self.rows(name, 0, self.stored_shape(name)[0])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, through transformers.

        Raises:
            CheckpointError: there is none, or it can't be used.
        """
        try:
            return self._load_tokenizer()
        except CheckpointError:
            raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever a wrong file leads transformers to; a panic of Rust is no Exception
            raise CheckpointError(f"the tokenizer of {self.path} can't be used: {one_line(error)}") from error

    def load(
        self, names: Iterable[str], dtype: torch.dtype, device: torch.device, progress: Progress | None = None
    ) -> dict[str, torch.Tensor]:
        """The named parameters, converted and in contiguous memory of their own; as ``load_stacked`` does it.

        Raises:
            CheckpointError: one is missing, or not of the shape that the configuration says.
        """
        return self.load_stacked({name: (name,) for name in names}, dtype, device, progress)

    def load_stacked(
        self,
        groups: Mapping[Key, Sequence[str]],
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> dict[Key, torch.Tensor]:
        """Groups of parameters, each group stacked by rows into one contiguous tensor under the group's name.

        ``{"qkv": [q, k, v]}`` gives ``{"qkv": [rows of q, of k and of v, width]}``; vectors follow one another. Rows
        are converted in blocks, straight into the result: beside it a few blocks of ``BLOCK_NUMBERS`` are held, never
        a whole parameter. ``progress`` counts parameters, not groups.

        Raises:
            CheckpointError: a parameter is missing, or not of the shape that the configuration says; nothing was read.
            ValueError: a group is empty, or its parameters are not of one width.
        """
        self._check(name for group in groups.values() for name in group)
        total, count = sum(map(len, groups.values())), 0
        loaded: dict[Key, torch.Tensor] = {}
        for key, group in groups.items():
            destination = loaded[key] = torch.empty(self._stacked_shape(key, group), dtype=dtype, device=device)
            first = 0
            for name in group:
                last = first + self.shape(name)[0]
                self._fill(destination[first:last], name)
                first = last
                count += 1
                if progress is not None:
                    progress(count, total)
        return loaded

    def _check_layers(self) -> None:
        """Compare numbers of layers before a list of as many names is made."""
        found = {match[1] for match in map(_LAYER_PREFIX.match, self.names) if match}
        if len(found) < self.geometry.layers:
            raise CheckpointError(
                f"{self.path} holds {len(found)} layers; by its configuration there are {self.geometry.layers}"
            )

    def _check_parts(self) -> None:
        foreign = min(filter(_FOREIGN_PART.match, self.names), default=None)
        if foreign is not None:
            raise CheckpointError(
                f"{self.path} holds {foreign}, a part of a quantised weight or of an adapter, and these are not "
                "supported: use the unquantised model (or a GGUF file), with adapters merged"
            )

    def _check(self, names: Iterable[str]) -> None:
        wanted = list(names)
        present = self.names
        missing = [name for name in wanted if name not in present]
        if missing:
            raise CheckpointError(f"{self.path} lacks {len(missing)} tensors that a Llama needs, {missing[0]} first")
        for name in wanted:
            if self.stored_shape(name) != self.shape(name):
                raise CheckpointError(
                    f"{self.path} has {name} of shape {list(self.stored_shape(name))}; by its configuration it is "
                    f"{list(self.shape(name))}"
                )
            reason = self._unreadable(name)
            if reason is not None:
                raise CheckpointError(f"{self.path} has {name} as {reason}")

    def _stacked_shape(self, key: object, group: Sequence[str]) -> tuple[int, ...]:
        shapes = [self.shape(name) for name in group]
        widths = {shape[1:] for shape in shapes}
        if len(widths) != 1:
            raise ValueError(f"{key} stacks {len(shapes)} parameters of {len(widths)} widths; it takes one width")
        return (sum(shape[0] for shape in shapes), *widths.pop())

    def _fill(self, destination: torch.Tensor, name: str) -> None:
        rows = destination.shape[0]
        step = max(1, BLOCK_NUMBERS // destination[0].numel())
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            destination[start:stop].copy_(self.rows(name, start, stop))

    def lm_head_name(self) -> str:
        """The output matrix's name: the embedding's if the two are tied and the files hold no matrix of its own."""
        return EMBEDDING if self.config.tie_word_embeddings and LM_HEAD not in self.names else LM_HEAD

    def matrices(self) -> list[str]:
        """Every matrix that the model computes with, and every bias; a tied output matrix is the embedding again."""
        biased = [*(_ATTENTION if self.config.attention_bias else ()), *(_MLP if self.config.mlp_bias else ())]
        parts = [*(f"{part}.weight" for part in (*_ATTENTION, *_MLP)), *(f"{part}.bias" for part in biased)]
        return [
            EMBEDDING,
            self.lm_head_name(),
            *(layer_name(index, part) for index in range(self.geometry.layers) for part in parts),
        ]

    def norms(self) -> list[str]:
        """The weights of every norm."""
        return [FINAL_NORM, *(layer_name(index, norm) for index in range(self.geometry.layers) for norm in LAYER_NORMS)]

    def parameters(self) -> list[str]:
        """Every parameter of the model."""
        return [*self.matrices(), *self.norms()]

    def generation_config(self) -> GenerationConfig:
        """How the model's makers want it to generate: its end tokens, above all.

        Raises:
            CheckpointError: what says so can't be used.
        """
        return check_generation_config(self.path, self._load_generation_config(), self.geometry.vocab)

    def _load_generation_config(self) -> GenerationConfig:
        try:
            return GenerationConfig.from_model_config(self.config)
        except Exception as error:  # transformers raises whatever wrong values lead it to
            raise CheckpointError(
                f"the configuration of {self.path} can't be used for generation: {one_line(error)}"
            ) from error

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
        """Names the model whatever its file format: a digest of its sizes, its norms and rows of every matrix.

        Norms, biases and small matrices count whole, of a larger matrix rows at equal distances, the last one among
        them. So what changes a whole matrix is seen, as fine-tuning and merging an adapter do. A change to rows between
        these is not seen. Two checkpoints of one model at different quantisations differ, and so do two that describe
        the same scaling of rotary positions in different terms.
        """
        digest = hashlib.sha256(repr((self.geometry, self._arithmetic())).encode())
        for name in self.norms():
            digest.update(self.read(name).to(torch.float32).numpy().tobytes())
        for name in self.matrices():
            digest.update(self._sample(name).to(torch.float32).numpy().tobytes())
        return digest.hexdigest()[:32]

    def _sample(self, name: str) -> torch.Tensor:
        """Rows of a matrix at equal distances, up to the last one; all of a vector."""
        rows, *width = self.shape(name)
        wanted = max(SAMPLED_ROWS, SAMPLED_NUMBERS // width[0]) if width else rows
        step = -(-rows // wanted)
        return self.rows(name, (rows - 1) % step, rows, step)

    def _arithmetic(self) -> list[tuple[str, str]]:
        """What the configuration says beside sizes, with numbers as exact as every file format keeps them."""
        rope = self.config.rope_parameters
        values = {"act": self.config.hidden_act, "eps": self.config.rms_norm_eps, **rope}
        return [(key, _rounded(value)) for key, value in sorted(values.items())]


def _rounded(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_rounded, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
