"""Describes a tensor to the peer: where it lies in its sender's segment, and how to release it.

A descriptor from a peer is validated before anything else is computed from it; integers are Python's, so that a shape's
product can't overflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec

from ..core.tensors import MAX_DIMENSIONS
from ..errors import PeerProtocolError
from ..text import printable
from .dtypes import BY_NAME, DType

DEVICE_OFFSET = 1 << 62
"""From here on, an offset is one into the sender's arena on a GPU."""
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


def representable(shape: Sequence[int], itemsize: int) -> bool:
    """Whether torch can make a tensor of this shape: its strides must fit 64 bits, even if a size is 0."""
    return math.prod(max(size, 1) for size in shape) * itemsize < 2**63


class TensorDescriptor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One tensor in the sender's data area.

    ``offset`` is in bytes from the start of the data area; from ``DEVICE_OFFSET`` on, it is that much more than the
    offset in the sender's arena on a GPU. To release the tensor, the receiver stores ``sequence`` in cell ``slot`` of
    its release table; sequence 0 means that there is nothing to release (a tensor without elements occupies no block).
    """

    offset: _Count
    shape: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    dtype: str
    slot: _Count
    sequence: _Count

    def validate(self, data_bytes: int, release_slots: int) -> tuple[DType, int]:
        """Check every field; the dtype's row, and the size in bytes.

        ``data_bytes`` is the size of the sender's data area, ``release_slots`` that of the receiver's own table.

        Raises:
            PeerProtocolError: naming the field that is out of range.
        """
        dtype = BY_NAME.get(self.dtype)
        if dtype is None:
            raise PeerProtocolError(f"descriptor has the unknown dtype '{printable(self.dtype[:32])}'")
        nbytes = math.prod(self.shape) * dtype.itemsize
        if nbytes == 0:
            if not representable(self.shape, dtype.itemsize):
                raise PeerProtocolError(f"descriptor of an empty tensor has the impossible shape {self.shape}")
            if self.sequence != 0:
                raise PeerProtocolError("descriptor of an empty tensor asks for a release")
            return dtype, 0
        if self.offset % dtype.itemsize:
            raise PeerProtocolError(f"descriptor offset {self.offset} is not aligned to {dtype.itemsize}-byte elements")
        if self.offset + nbytes > data_bytes:
            raise PeerProtocolError(
                f"descriptor spans bytes {self.offset}..{self.offset + nbytes} of a data area of {data_bytes} bytes"
            )
        if self.slot >= release_slots or self.sequence == 0:
            raise PeerProtocolError(
                f"descriptor names release slot {self.slot} of {release_slots}, sequence {self.sequence}"
            )
        return dtype, nbytes
