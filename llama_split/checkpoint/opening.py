"""Opens a model by its path or hub id, or explains why there is none that can be split."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from transformers import AutoConfig, LlamaConfig

from ..errors import CheckpointError
from .base import Checkpoint
from .files import one_line, read_object
from .gguf import GgufCheckpoint
from .safetensors import SafetensorsCheckpoint
from .soundness import check_values

_CONFIG = "config.json"


def open_checkpoint(path_or_hub_id: str | os.PathLike[str] | Checkpoint, gguf_file: str | None = None) -> Checkpoint:
    """Open a model.

    Args:
        path_or_hub_id: a directory, a GGUF file, or a hub id, which huggingface_hub fetches unless it is cached. A
            checkpoint that is already open is returned as it is.
        gguf_file: the GGUF file to open in a directory or hub repository.

    Raises:
        CheckpointError: there is no such model, it can't be read, or it is no Llama.
    """
    if isinstance(path_or_hub_id, Checkpoint):
        return path_or_hub_id
    name = os.fspath(path_or_hub_id)
    try:
        return _open(name, gguf_file)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the model at {name!r} can't be read: {one_line(error)}") from error


def _open(path_or_hub_id: str, gguf_file: str | None) -> Checkpoint:
    path = Path(path_or_hub_id).expanduser()
    if not path.exists():
        path = _fetch(path_or_hub_id, gguf_file)
    if not path.is_dir():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is neither a directory nor a .gguf file")
        return GgufCheckpoint(path)
    if gguf_file is None and not any(path.glob("*.safetensors")):
        gguf_file = _only_gguf_file(path)
    if gguf_file is not None:
        if not (path / gguf_file).exists():
            raise CheckpointError(f"{path} holds no file {gguf_file}")
        return GgufCheckpoint(path / gguf_file)
    return SafetensorsCheckpoint(path, _read_config(path))


def _only_gguf_file(path: Path) -> str | None:
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(f"{path} holds {len(files)} GGUF files: name one ({files[0].name}, …)")
    return files[0].name if files else None


def _read_config(path: Path) -> LlamaConfig:
    if not (path / _CONFIG).exists():
        raise CheckpointError(f"{path} holds neither {_CONFIG} nor a .gguf file: is it a model's directory?")
    values = read_object(path / _CONFIG)
    if values.get("model_type") == LlamaConfig.model_type:
        check_values(path, values)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a wrong file may raise anything in transformers
        raise CheckpointError(f"the {_CONFIG} in {path} can't be used: {one_line(error)}") from error
    if type(config) is not LlamaConfig:
        raise CheckpointError(
            f"{path} holds a model of type {config.model_type!r}; only Llama models (model_type llama) are supported"
        )
    return config


def _fetch(hub_id: str, gguf_file: str | None) -> Path:
    """The directory of a hub model in the local cache; fetches it if needed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"] if gguf_file is None else ["*.json", gguf_file]
    if hub_id.count("/") == 1 and not hub_id.startswith((".", "/", "~")):
        with contextlib.suppress(HFValidationError, LocalEntryNotFoundError, OSError):
            return Path(snapshot_download(hub_id, allow_patterns=patterns))
    raise CheckpointError(f"no model at {hub_id!r}: no such path exists, and no model hub has it")
