"""Both ends of one direction in one process, and tensors of random bits to send through it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from types import ModuleType
from unittest import mock

import numpy as np
import torch

from shmtransport.core import Counters
from shmtransport.core.layout import Layout
from shmtransport.errors import ArenaFull
from shmtransport.memory import receive_arena, send_arena, views
from shmtransport.memory.dtypes import DType
from shmtransport.memory.receive_arena import ReceiveArena, release_cells
from shmtransport.memory.segment import Segment
from shmtransport.memory.send_arena import SendArena


class Pair:
    """A send arena and the peer's receive arena over it; each end of a segment is a mapping of its own.

    ``claim_timeout_s`` and ``check_peer``: see ``SendArena``. ``core`` is one of the twins; by default the package's.
    """

    def __init__(
        self,
        data_bytes: int = 16 * 1024,
        slots: int = 64,
        claim_timeout_s: float = 0.0,
        check_peer: Callable[[], None] = lambda: None,
        core: ModuleType | None = None,
    ) -> None:
        twin = core or views
        self.data_bytes = data_bytes
        layout = Layout(data_bytes=data_bytes, release_slots=slots)
        self.owner, self.reader = Segment.create(layout), Segment.create(layout)
        self._segments = [
            self.owner,
            self.reader,
            Segment.attach(self.owner.name, self.owner.layout),
            Segment.attach(self.reader.name, self.reader.layout),
        ]
        self.counters = Counters()
        self.copied: list[int] = []  # sizes of those passed on that were copied in
        self.cells = release_cells(self.reader)
        released = release_cells(self._segments[3])
        with (
            mock.patch.object(send_arena, "Loans", twin.Loans),
            mock.patch.object(receive_arena, "Borrows", twin.Borrows),
        ):
            self.send = SendArena(self.owner, released, self.counters, claim_timeout_s, check_peer)
            self.receive = ReceiveArena(self._segments[2], self.cells)

    def pass_on(self, value: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Send a value to the other side."""
        export = self.send.export if isinstance(value, torch.Tensor) else self.send.export_array
        descriptor = export(value)
        if (nbytes := self.send.copies.pop(descriptor.sequence, None)) is not None:
            self.copied.append(nbytes)
        return self.receive.borrow(descriptor)

    def is_free(self) -> bool:
        """Whether one tensor of the whole arena could be had now."""
        try:
            self.send.lend((self.data_bytes,), torch.uint8)
        except ArenaFull:
            return False
        return True

    def close(self) -> None:
        for segment in self._segments:
            segment.close()


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, whatever its dtype."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(row: DType, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits in an ordinary tensor: among floats NaNs with payloads, subnormals and infinities too."""
    nbytes = math.prod(shape) * row.itemsize
    data = bytearray(random.Random(seed).randbytes(nbytes))
    if row.name == "bool":
        data = bytearray(byte & 1 for byte in data)
    return torch.frombuffer(data, dtype=row.torch).view(shape)
