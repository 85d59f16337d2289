"""Borrows tensors that lie in the peer's segment, and tells the peer when they are released.

What is borrowed is the core's (``core/borrows``), which makes a tensor of a valid descriptor. Of any other this module
says in words what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..core.refusals import cut_short
from ..errors import PeerProtocolError
from .descriptor import DEVICE_OFFSET, TensorDescriptor
from .segment import Segment
from .views import TENSORS, Borrows


class ReceiveArena:
    """The peer's segment, seen as tensors that it has sent.

    Args:
        segment: The peer's.
        released: The cells of the release table in this process's own segment.
        borrow_on_device: Makes the view of a tensor in the peer's arena on a GPU. Default: there is none.
    """

    def __init__(
        self,
        segment: Segment,
        released: memoryview,
        borrow_on_device: Callable[[TensorDescriptor], Any] | None = None,
    ) -> None:
        self._borrow_on_device = borrow_on_device
        self._segment = segment
        self._data_bytes = segment.layout.data_bytes
        self._slots = len(released)
        self.borrows = Borrows(segment.data, released, TENSORS)
        """What is borrowed, for the core."""

    def __len__(self) -> int:
        """How many borrows are held."""
        return len(self.borrows)

    def abandon(self) -> None:
        """In a forked child: what dies here is still borrowed in the parent, so it is not released."""
        self.borrows.abandon()

    def check_whole(self) -> None:
        """Check that what was read here so far was the peer's.

        Raises:
            PeerProtocolError: the peer has cut its segment short, and zeros were read in place of what it cut off.
        """
        if self._segment.was_cut:
            raise cut_short()

    def borrow(self, descriptor: TensorDescriptor) -> torch.Tensor:
        """Make a view of the described tensor; it is released when the last tensor over its storage has died.

        Raises:
            PeerProtocolError: the descriptor is invalid.
        """
        tensor: torch.Tensor | None = self.borrows.borrow(
            descriptor.offset, descriptor.shape, descriptor.dtype, descriptor.slot, descriptor.sequence
        )
        return self._look_closely(descriptor) if tensor is None else tensor

    def _look_closely(self, descriptor: TensorDescriptor) -> torch.Tensor:
        """Make the tensor without elements, or on a GPU, that was described, or say what is wrong."""
        if descriptor.offset >= DEVICE_OFFSET and self._borrow_on_device is not None:
            tensor: torch.Tensor = self._borrow_on_device(descriptor)
            return tensor
        row, nbytes = descriptor.validate(self._data_bytes, self._slots)
        if nbytes == 0:
            return torch.empty(descriptor.shape, dtype=row.torch)
        raise PeerProtocolError(f"descriptor names release slot {descriptor.slot}, which an earlier tensor still holds")


def release_cells(segment: Segment) -> memoryview:
    """The release table of a segment as unsigned 64-bit cells, one aligned store each."""
    layout = segment.layout
    return segment.view[layout.release_offset : layout.release_offset + layout.release_bytes].cast("Q")
