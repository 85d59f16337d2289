"""Checkpoints in directories as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

from ..errors import CheckpointError
from .base import Checkpoint, one_line

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class SafetensorsCheckpoint(Checkpoint):
    """A directory with one safetensors file, or with several and an index.

    Raises:
        CheckpointError: a file is missing, cut off or no safetensors file, or lacks a tensor that the index names.
    """

    def __init__(self, path: Path, config: LlamaConfig) -> None:
        super().__init__(path, config)
        try:
            self._files = self._indexed() if (path / _INDEX).exists() else self._single()
            self._shapes: dict[str, tuple[int, ...]] = {}
            for file in sorted(set(self._files.values())):
                with self._open(file) as opened:
                    names = [name for name, holder in self._files.items() if holder == file]
                    self._shapes.update((name, tuple(opened.get_slice(name).get_shape())) for name in names)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the safetensors files in {path} can't be read: {one_line(error)}") from error

    def _indexed(self) -> dict[str, Path]:
        shards: dict[str, str] = json.loads((self.path / _INDEX).read_text())["weight_map"]
        return {name: self.path / shard for name, shard in shards.items()}

    def _single(self) -> dict[str, Path]:
        file = self.path / _SINGLE
        with self._open(file) as opened:
            return dict.fromkeys(opened.keys(), file)

    @staticmethod
    def _open(file: Path) -> Any:
        return safe_open(str(file), framework="pt")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        # The file is mapped for these rows only: pages that were read count as this process's memory while it is.
        with self._open(self._files[name]) as opened:
            found: torch.Tensor = opened.get_slice(name)[start:stop]
        return found

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)

    def generation_config(self) -> GenerationConfig:
        if not (self.path / "generation_config.json").is_file():
            return super().generation_config()
        try:
            return GenerationConfig.from_pretrained(self.path)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"the generation_config.json in {self.path} can't be used: {one_line(error)}"
            ) from error
