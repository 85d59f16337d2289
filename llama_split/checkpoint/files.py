"""Checks a model's file before it is opened: that it is a regular file, and not a stand-in for one."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_POINTER_START = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""The files that Git LFS uses as pointers are smaller than this."""

_LONGEST_CAUSE = 400

_TOKENIZER_SUFFIXES = (".json", ".model", ".jinja", ".txt")
_TEMPLATES = "additional_chat_templates"


def one_line(error: BaseException) -> str:
    """The text of an error as one line of bounded length; its type if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_CAUSE else text[:_LONGEST_CAUSE] + " …"


def check_file(path: Path) -> Path:
    """Return the path if it is a regular file: reading from a FIFO would block. Symbolic links are followed.

    Raises:
        CheckpointError: it is missing, no regular file, or a pointer that Git LFS has put in the file's place.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is no regular file")
        if found.st_size < _POINTER_BYTES and path.read_bytes().startswith(_POINTER_START):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {one_line(error)}") from error
    return path


def check_tokenizer_files(directory: Path) -> None:
    """Check all files of a directory that transformers may read for a tokenizer.

    Raises:
        CheckpointError: one is no regular file, or a Git LFS pointer.
    """
    for path in sorted([*directory.iterdir(), *(directory / _TEMPLATES).glob("*")]):
        if path.suffix in _TOKENIZER_SUFFIXES and path.exists() and not path.is_dir():
            check_file(path)


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        CheckpointError: the file can't be read, is no JSON, or holds no object.
    """
    check_file(path)
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be used: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} can't be used: it holds no JSON object")
    return found
