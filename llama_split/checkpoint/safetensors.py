"""Checkpoints in directories, as transformers saves them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

from ..errors import CheckpointError
from .base import Checkpoint
from .files import check_file, check_tokenizer_files, one_line, read_object
from .generation import read_generation_config
from .outline import EMBEDDING, LM_HEAD

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_GENERATION = "generation_config.json"
_ADAPTER = "adapter_config.json"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# A model saved without its output matrix lacks the prefix "model."; some tools prefix the output matrix as well.
_WITHOUT_PREFIX = re.compile(r"^(embed_tokens|layers|norm)\.")
_WITH_TOO_MUCH = f"model.{LM_HEAD}"


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is stored, and in which form; ``dtype_name`` is safetensors' name of its dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype_name: str


class SafetensorsCheckpoint(Checkpoint):
    """A directory with one safetensors file, or several and an index. Chooses files and names as transformers does.

    Raises:
        CheckpointError: a file is missing, truncated or no safetensors file, or lacks a tensor that the index names; or
            as for ``Checkpoint``.
    """

    def __init__(self, path: Path, config: LlamaConfig) -> None:
        if (path / _ADAPTER).exists():
            raise CheckpointError(
                f"{path} holds an adapter ({_ADAPTER}), which is not applied: merge it into the model (peft's "
                "merge_and_unload) and save that"
            )
        self.path = path
        files, promised = self._choose_files(getattr(config, "transformers_weights", None))
        try:
            self._stored = self._list_tensors(files)
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise CheckpointError(f"the safetensors files in {path} can't be read: {one_line(error)}") from error
        missing = sorted(promised - self._stored.keys())
        if missing:
            raise CheckpointError(f"{path} lacks {len(missing)} tensors that its index names, {missing[0]} first")
        if config.tie_word_embeddings and EMBEDDING not in self._stored and LM_HEAD in self._stored:
            self._stored[EMBEDDING] = self._stored[LM_HEAD]
        super().__init__(path, config)

    def _choose_files(self, named: Any) -> tuple[list[Path], set[str]]:
        """The files that hold the weights, in transformers' order, and the tensors that an index promises."""
        chosen = named or (_SINGLE if (self.path / _SINGLE).exists() else _INDEX)
        if named is None and not (self.path / chosen).exists():
            raise CheckpointError(f"{self.path} holds neither {_SINGLE} nor {_INDEX}: save it with save_pretrained")
        if not isinstance(chosen, str):
            raise CheckpointError(f"{self.path} names no file as its transformers_weights")
        if not chosen.endswith(".index.json"):
            return [self._inside(chosen)], set()
        weights = read_object(self._inside(chosen)).get("weight_map")
        if not isinstance(weights, dict) or not weights or not all(isinstance(file, str) for file in weights.values()):
            raise CheckpointError(f"{self.path / chosen} can't be used: its weight_map names no files")
        return [self._inside(file) for file in sorted(set(weights.values()))], set(map(_as_transformers, weights))

    def _inside(self, name: str) -> Path:
        """The file of this name in the directory. Symbolic links are followed: a hub's cache consists of them."""
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise CheckpointError(f"{self.path} names {name!r} as a file of its weights, which is outside of it")
        return check_file(self.path / name)

    @classmethod
    def _list_tensors(cls, files: Iterable[Path]) -> dict[str, _Stored]:
        """All tensors by transformers' name; where two files have the same one, the later file counts."""
        found: dict[str, _Stored] = {}
        for file in files:
            with cls._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - no dict
                    stored = opened.get_slice(name)
                    found[_as_transformers(name)] = _Stored(file, name, tuple(stored.get_shape()), stored.get_dtype())
        return found

    @staticmethod
    def _open(file: Path) -> Any:
        return safe_open(str(file), framework="pt")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def rows(self, name: str, start: int, stop: int, step: int = 1) -> torch.Tensor:
        # Map the file for these rows only: while it is mapped, pages that were read count as this process's memory.
        stored = self._stored[name]
        with self._open(stored.file) as opened:
            found: torch.Tensor = opened.get_slice(stored.name)[start:stop:step]
        return found

    def _unreadable(self, name: str) -> str | None:
        found = self._stored[name].dtype_name
        if found in _DTYPES:
            return None
        return f"{found}, a dtype of quantised weights; {', '.join(_DTYPES)} and GGUF files are supported"

    def _stored_dtype(self) -> torch.dtype:
        """The dtype of the first tensor of floats, as in transformers."""
        return next(_DTYPES[each.dtype_name] for each in self._stored.values() if each.dtype_name in _DTYPES)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        check_tokenizer_files(self.path)
        return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)

    def _load_generation_config(self) -> GenerationConfig:
        if not (self.path / _GENERATION).exists():
            return super()._load_generation_config()
        return read_generation_config(self.path / _GENERATION)


def _as_transformers(name: str) -> str:
    """Transformers' name for a tensor that is saved under this name."""
    if name == _WITH_TOO_MUCH:
        return LM_HEAD
    return f"model.{name}" if _WITHOUT_PREFIX.match(name) else name
