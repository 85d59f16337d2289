"""What every checkpoint can do: name its tensors, return rows of them, load them, and identify itself."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

from ..boundary.geometry import Geometry
from ..errors import CheckpointError
from .files import one_line
from .generation import check_generation_config
from .outline import EMBEDDING, FOREIGN, LAYER_PREFIX, LM_HEAD, Outline, parameter_shape
from .soundness import check_config, check_rotary

BLOCK_NUMBERS = 1 << 20
"""How many numbers are read and converted at a time, however large the tensor is: 4 MiB in float32.

Blocks are not smaller because torch joins its threads after each one, which is slow where they spin on busy cores.
"""

SAMPLED_ROWS = 16
SAMPLED_NUMBERS = 1 << 15
"""A fingerprint reads this many rows of each matrix, or as many as hold this many numbers, whichever is more."""

Key = TypeVar("Key")

Progress = Callable[[int, int], None]
"""Called with the number of tensors loaded and their total."""


class Checkpoint(ABC):
    """A model's files, checked to hold everything that their configuration asks for.

    ``names`` and ``stored_shape`` of a subclass must work before it calls this ``__init__``, once ``config`` and
    ``geometry`` are set.

    Args:
        path: where the model is; for messages.
        config: its configuration.

    Raises:
        CheckpointError: the configuration describes no Llama that can be computed; or a tensor is missing, has another
            shape than the configuration says, or is stored in a way that can't be read.
    """

    def __init__(self, path: Path, config: LlamaConfig) -> None:
        self.path = path
        self.config = config
        check_config(path, config)
        # transformers' name for this public choice. A split has its own attention, whatever the file says.
        config._attn_implementation = "sdpa"  # noqa: SLF001
        self.geometry = Geometry.of(config)
        self._check_layers()
        self._refuse_foreign()
        self._check(self.parameters())
        check_rotary(path, config)
        self.dtype = self._stored_dtype() if config.dtype is None else config.dtype

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """The names of the parameters in the files."""

    @abstractmethod
    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter in the files; reads nothing of it."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int, step: int = 1) -> torch.Tensor:
        """Rows of one parameter (elements, for a vector) as they are stored, or in float32 if it is quantised.

        The result may be a view of the file; copy it to keep it.

        Args:
            name: the parameter.
            start: the first row.
            stop: the row after the last.
            step: the distance between rows.
        """

    @abstractmethod
    def _unreadable(self, name: str) -> str | None:
        """Why a stored parameter can't be read as the numbers of the model; None if it can."""

    @abstractmethod
    def _stored_dtype(self) -> torch.dtype:
        """The dtype of the weights in the files, for configurations that name none."""

    @abstractmethod
    def _load_tokenizer(self) -> PreTrainedTokenizerBase: ...

    def read(self, name: str) -> torch.Tensor:
        """One whole parameter as it is stored, or in float32 if it is quantised."""
        return self.rows(name, 0, self.stored_shape(name)[0])

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """One parameter as ``rows`` returns it, in blocks of about ``BLOCK_NUMBERS``."""
        rows, *width = self.shape(name)
        step = max(1, BLOCK_NUMBERS // math.prod(width))
        for start in range(0, rows, step):
            yield self.rows(name, start, min(start + step, rows))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer with transformers.

        Raises:
            CheckpointError: there is none, or it can't be used.
        """
        try:
            return self._load_tokenizer()
        except CheckpointError:
            raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a wrong file may raise anything; a panic in Rust is no Exception
            raise CheckpointError(f"the tokenizer of {self.path} can't be used: {one_line(error)}") from error

    def load(
        self, names: Iterable[str], dtype: torch.dtype, device: torch.device, progress: Progress | None = None
    ) -> dict[str, torch.Tensor]:
        """Load parameters, each into contiguous memory of its own; see ``load_stacked``.

        Args:
            names: the parameters.
            dtype: of the results.
            device: of the results.
            progress: called with the number of parameters loaded and their total.

        Raises:
            CheckpointError: a parameter is missing, or has another shape than the configuration says.
        """
        return self.load_stacked({name: (name,) for name in names}, dtype, device, progress)

    def load_stacked(
        self,
        groups: Mapping[Key, Sequence[str]],
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> dict[Key, torch.Tensor]:
        """Load groups of parameters, each group stacked by rows into one contiguous tensor.

        ``{"qkv": [q, k, v]}`` returns ``{"qkv": [rows of q, then k, then v; width]}``; vectors are concatenated. Rows
        are converted in blocks, straight into the result, so memory holds a few blocks of ``BLOCK_NUMBERS`` besides it,
        never a whole parameter.

        Args:
            groups: the parameters of each group, by the group's key.
            dtype: of the results.
            device: of the results.
            progress: called with the number of parameters (not groups) loaded and their total.

        Raises:
            CheckpointError: a parameter is missing, or has another shape than the configuration says; nothing was read.
            ValueError: a group is empty, or its parameters have different widths.
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
        """Compare the number of layers before a list of that many names is built."""
        found = {match[1] for match in map(LAYER_PREFIX.match, self.names) if match}
        if len(found) < self.geometry.layers:
            raise CheckpointError(
                f"{self.path} holds {len(found)} layers; by its configuration there are {self.geometry.layers}"
            )

    def _refuse_foreign(self) -> None:
        foreign = min(filter(FOREIGN.match, self.names), default=None)
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
        first = 0
        for block in self.blocks(name):
            destination[first : first + len(block)].copy_(block)
            first += len(block)

    @property
    def outline(self) -> Outline:
        """The names and shapes of the parameters, as the configuration gives them."""
        config = self.config
        return Outline(self.geometry, config.attention_bias, config.mlp_bias, self.lm_head_name())

    def lm_head_name(self) -> str:
        """The name of the output matrix: the embedding's if the two are tied and the files hold no other."""
        return EMBEDDING if self.config.tie_word_embeddings and LM_HEAD not in self.names else LM_HEAD

    def parameters(self) -> list[str]:
        """All parameters of the model."""
        return self.outline.parameters()

    def generation_config(self) -> GenerationConfig:
        """The generation settings that come with the model, most importantly its end tokens.

        Raises:
            CheckpointError: they can't be used.
        """
        return check_generation_config(self.path, self._load_generation_config(), self.geometry.vocab)

    def _load_generation_config(self) -> GenerationConfig:
        try:
            return GenerationConfig.from_model_config(self.config)
        except Exception as error:  # wrong values may raise anything in transformers
            raise CheckpointError(
                f"the configuration of {self.path} can't be used for generation: {one_line(error)}"
            ) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the configuration gives a parameter."""
        return parameter_shape(self.geometry, name)

    def fingerprint(self) -> str:
        """Identify the model, whatever its file format: a digest of its sizes, its norms and rows of every matrix.

        Norms, biases and small matrices count as a whole; of a larger matrix, rows at equal distances do, including the
        last one. This notices whatever changes a whole matrix, such as fine-tuning or a merged adapter, but not a
        change to rows in between. Two quantisations of one model have different fingerprints, and so have two
        checkpoints that describe the same scaling of rotary positions in different terms.
        """
        digest = hashlib.sha256(repr((self.geometry, self._arithmetic())).encode())
        for name in self.outline.norms():
            digest.update(self.read(name).to(torch.float32).numpy().tobytes())
        for name in self.outline.matrices():
            digest.update(self._sample(name).to(torch.float32).numpy().tobytes())
        return digest.hexdigest()[:32]

    def _sample(self, name: str) -> torch.Tensor:
        """Rows of a matrix at equal distances, including the last one; all of a vector."""
        rows, *width = self.shape(name)
        wanted = max(SAMPLED_ROWS, SAMPLED_NUMBERS // width[0]) if width else rows
        step = -(-rows // wanted)
        return self.rows(name, (rows - 1) % step, rows, step)

    def _arithmetic(self) -> list[tuple[str, str]]:
        """What the configuration says besides sizes, with the precision that every file format keeps."""
        rope = self.config.rope_parameters
        values = {"act": self.config.hidden_act, "eps": self.config.rms_norm_eps, **rope}
        return [(key, _rounded(value)) for key, value in sorted(values.items())]


def _rounded(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_rounded, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
