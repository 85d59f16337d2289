"""A client's and a server's protocol with nothing between them, over dicts in place of arenas."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from shmtransport.core import Counters
from shmtransport.errors import ArenaFull, PeerProtocolError, TransportError
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.memory.dtypes import BY_NAME, BY_TORCH
from shmtransport.protocol.calls import Call, ClientProtocol, ServerProtocol
from shmtransport.protocol.in_flight import CallInFlight
from shmtransport.protocol.values import Codec


class Direction:
    """Stands in for both ends of one direction: a dict of what was sent, by sequence.

    ``held`` are the sequences that the receiver has not released; ``room`` is how many more tensors fit.
    """

    loans = borrows = None  # nothing that the core could use by itself

    def __init__(self) -> None:
        self.sent: dict[int, torch.Tensor] = {}
        self.held: set[int] = set()
        self.copies: dict[int, int] = {}
        self.room = 1_000_000
        self._sequence = 0

    def export(self, tensor: torch.Tensor) -> TensorDescriptor:
        if self.room == 0:
            raise ArenaFull("requested 1 MiB; arena is 1 MiB")
        self.room -= 1
        self._sequence += 1
        self.sent[self._sequence] = tensor
        self.held.add(self._sequence)
        return TensorDescriptor(0, tuple(tensor.shape), BY_TORCH[tensor.dtype].name, 0, self._sequence)

    def export_array(self, array: np.ndarray[Any, Any]) -> TensorDescriptor:
        return self.export(torch.from_numpy(array))

    def export_foreign(self, tensor: Any) -> TensorDescriptor:
        raise AssertionError(f"a {type(tensor).__name__} on a GPU")

    def complete(self, descriptors: Sequence[TensorDescriptor]) -> None:
        """No GPU copies any of them."""

    def finish(self) -> None:
        """No GPU has anything left to do."""

    def withdraw(self, descriptors: Sequence[TensorDescriptor]) -> None:
        for descriptor in descriptors:
            self._end(descriptor.sequence)

    def borrow(self, descriptor: TensorDescriptor) -> torch.Tensor:
        if descriptor.sequence not in self.sent or descriptor.dtype not in BY_NAME:
            raise PeerProtocolError(f"descriptor with sequence {descriptor.sequence} is invalid")
        view = self.sent[descriptor.sequence].clone()
        weakref.finalize(view, self._end, descriptor.sequence)
        return view

    def check_whole(self) -> None:
        """Nothing can be cut short here."""

    def _end(self, sequence: int) -> None:
        self.held.discard(sequence)
        self.sent.pop(sequence, None)


class ProtocolPair:
    """A client's and a server's protocol with nothing between them."""

    def __init__(self, max_message_bytes: int = 65536, *, snapshot: bool = False) -> None:
        self.up, self.down = Direction(), Direction()
        self.client_counters, self.server_counters = Counters(), Counters()
        self.client = ClientProtocol(
            Codec(self.up, self.down, self.client_counters, max_message_bytes, snapshot=snapshot), self.client_counters
        )
        self.server = ServerProtocol(
            Codec(self.down, self.up, self.server_counters, max_message_bytes), self.server_counters
        )

    def request(self, *arguments: Any, **keywords: Any) -> tuple[CallInFlight, bytes]:
        pending = CallInFlight("method")
        data = self.client.begin_call(pending, arguments, keywords)
        self.client.expect_reply(pending)
        return pending, data

    def submit(self, *arguments: Any, **keywords: Any) -> tuple[CallInFlight, Call]:
        """A request, received by the server."""
        pending, data = self.request(*arguments, **keywords)
        call = self.server.take_request(data)
        assert call is not None
        return pending, call

    def fail(self, error: BaseException) -> TransportError:
        """What the client raises for a handler's error."""
        pending, call = self.submit()
        self.client.take_reply(self.server.encode_failure(call.call_id, error))
        with pytest.raises(TransportError) as caught:
            pending.take_result()
        return caught.value
