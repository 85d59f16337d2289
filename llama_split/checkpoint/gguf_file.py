"""Reads a GGUF file's header: its plain fields, and where each tensor is.

The ``gguf`` package's own reader creates an object for every word of the vocabulary, which takes seconds. The
vocabulary is not needed here, so arrays are skipped.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_FORMATS: dict[gguf.GGUFValueType, str] = {
    gguf.GGUFValueType.UINT8: "B",
    gguf.GGUFValueType.INT8: "b",
    gguf.GGUFValueType.UINT16: "H",
    gguf.GGUFValueType.INT16: "h",
    gguf.GGUFValueType.UINT32: "I",
    gguf.GGUFValueType.INT32: "i",
    gguf.GGUFValueType.FLOAT32: "f",
    gguf.GGUFValueType.UINT64: "Q",
    gguf.GGUFValueType.INT64: "q",
    gguf.GGUFValueType.FLOAT64: "d",
    gguf.GGUFValueType.BOOL: "?",
}
_LENGTH = struct.Struct("<Q")


class SkippedArray:
    """Stands for a field that is an array; its items were not read."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file; ``offset`` and ``row_bytes`` are in bytes, the last dimension is the length of a row."""

    shape: tuple[int, ...]
    quantisation: gguf.GGMLQuantizationType
    offset: int
    row_bytes: int


class GgufFile:
    """A mapped GGUF file: ``fields`` by name, ``tensors`` by name.

    Raises:
        ValueError: the file is truncated, contradicts itself, or is no GGUF file of a known version.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            _Parser(self._data).parse(self.fields, self.tensors)
        except (struct.error, OverflowError) as error:  # a position after the end, or too large for a position
            raise ValueError("it ends within its header") from error
        self._bytes = np.frombuffer(self._data, np.uint8)

    def rows(self, tensor: StoredTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A tensor's bytes [rows, bytes per row] as a view of the file; a vector is one row."""
        count = prod(tensor.shape[:-1])
        end = tensor.offset + count * tensor.row_bytes
        return self._bytes[tensor.offset : end].reshape(count, tensor.row_bytes)

    def let_go(self, tensor: StoredTensor) -> None:
        """Release a tensor's pages, which count as this process's memory once read; they can be read again."""
        start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = tensor.offset + prod(tensor.shape[:-1]) * tensor.row_bytes
        self._data.madvise(mmap.MADV_DONTNEED, start, end - start)


class _Parser:
    """Reads a header from its beginning to its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._position = 0

    def parse(self, fields: dict[str, Any], tensors: dict[str, StoredTensor]) -> None:
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin like a GGUF file")
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}; versions {_VERSIONS} in little-endian order can be read")
        tensor_count, field_count = self._number("Q"), self._number("Q")
        for _ in range(field_count):
            name = self._text()
            if name in fields:
                raise ValueError(f"it has the field {name} twice")
            fields[name] = self._value(gguf.GGUFValueType(self._number("I")))
        unplaced: dict[str, StoredTensor] = {}
        for _ in range(tensor_count):
            name = self._text()
            if name in unplaced:
                raise ValueError(f"it has the tensor {name} twice")
            unplaced[name] = self._tensor(name)
        alignment = fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError("its alignment is not a power of two")
        first = -(-self._position // alignment) * alignment
        tensors.update((name, self._placed(name, tensor, first)) for name, tensor in unplaced.items())

    def _take(self, count: int) -> bytes:
        start, self._position = self._position, self._position + count
        if self._position > len(self._data):
            raise ValueError("it ends within its header")
        return self._data[start : self._position]

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._position)
        self._position += struct.calcsize(f"<{code}")
        return value

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8")

    def _value(self, value_type: gguf.GGUFValueType) -> Any:
        if value_type is gguf.GGUFValueType.STRING:
            return self._text()
        if value_type is gguf.GGUFValueType.ARRAY:
            self._skip_array(gguf.GGUFValueType(self._number("I")), self._number("Q"))
            return SkippedArray()
        return self._number(_FORMATS[value_type])

    def _skip_array(self, item_type: gguf.GGUFValueType, count: int) -> None:
        if item_type is gguf.GGUFValueType.ARRAY:
            raise ValueError("it has arrays of arrays")
        position, data, length_at = self._position, self._data, _LENGTH.unpack_from
        if item_type is not gguf.GGUFValueType.STRING:
            position += count * struct.calcsize(f"<{_FORMATS[item_type]}")
        else:
            for _ in range(count):  # hundreds of thousands in a vocabulary: only skip here
                position += 8 + length_at(data, position)[0]
        self._position = position
        self._take(0)

    def _tensor(self, name: str) -> StoredTensor:
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"its tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        quantisation = gguf.GGMLQuantizationType(self._number("I"))
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
        if min(shape) < 1 or shape[-1] % block:
            raise ValueError(f"its tensor {name} of {quantisation.name} has the shape {list(shape)}")
        return StoredTensor(shape, quantisation, self._number("Q"), shape[-1] // block * block_bytes)

    def _placed(self, name: str, tensor: StoredTensor, first: int) -> StoredTensor:
        offset = first + tensor.offset
        end = offset + prod(tensor.shape[:-1]) * tensor.row_bytes
        if end > len(self._data):
            raise ValueError(f"it ends within or before its tensor {name}")
        return StoredTensor(tensor.shape, tensor.quantisation, offset, tensor.row_bytes)


@cache
def readable() -> list[str]:
    """The quantisations that the installed gguf package can decode, found by trying each on a block of zeros."""
    names = []
    for quantisation, (_, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), quantisation)
        except NotImplementedError:
            continue
        names.append(quantisation.name)
    return names
