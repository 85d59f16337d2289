"""What the blocking and the asyncio client share: options, arenas, statistics, and the state of the connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

from ..channels import address as addresses
from ..core import CORE, Counters
from ..errors import CallTimeout, Closed, PeerProtocolError, TransportError
from ..memory.dtypes import AnyDType
from ..memory.forks import BoundToProcess, forked
from ..memory.ownership import registry
from ..protocol.in_flight import CallInFlight
from ..protocol.messages import ChannelKind
from ..protocol.uncompiled import uncompiled
from ..statistics import Statistics
from .client_connection import ClientConnection
from .connection_memory import tensor_on_device
from .options import ClientOptions, cuda_device

ConnectionT = TypeVar("ConnectionT", bound=ClientConnection)


class ConnectionState(Generic[ConnectionT]):
    """A client's connection, before it is made, while it lives, and after its end."""

    def __init__(self) -> None:
        self.connection: ConnectionT | None = None
        self.ended: TransportError | None = None
        """What every use raises once the connection has ended."""

    def live(self) -> ConnectionT:
        """Return the connection.

        Raises:
            Closed: there is none yet, or it was closed.
            TransportError: what it has ended with.
        """
        if self.ended is not None:
            raise type(self.ended)(*self.ended.args)
        if self.connection is None:
            raise Closed("this client is not connected yet: use it in an 'async with' block, or await connect()")
        return self.connection

    @property
    def flush(self) -> bool:
        """Whether a goodbye was sent that should still go out."""
        return isinstance(self.ended, (Closed, PeerProtocolError))

    def abandon(self) -> None:
        """In a forked child: end without touching what is the parent's."""
        if self.ended is None:
            self.ended = forked("the connection")
            if self.connection is not None:
                self.connection.protocol.fail_all(self.ended)
        if self.connection is not None:
            self.connection.abandon()

    def __str__(self) -> str:
        if self.ended is not None:
            return f"ended ({self.ended})"
        if self.connection is None:
            return "not connected yet"
        return f"connected to process {self.connection.server_pid}, {len(self.connection.protocol)} calls in flight"


def timeout_error(call: CallInFlight, connection: ClientConnection, timeout_s: float) -> CallTimeout:
    """The error of a call that was sent and has no reply after ``timeout_s`` seconds."""
    held = len(connection.memory.receive_arena)
    error = CallTimeout(
        f"no reply to {call.method!r} within {timeout_s:g} s; {len(connection.protocol) - 1} other calls "
        f"in flight; the server (process {connection.server_pid}) is alive: raise timeout_s or look at its log"
        + (f"; {held} received tensors are kept here, and a result without room waits for them" if held else "")
    )
    error.sent = True
    return error


def full_error(timeout_s: float) -> CallTimeout:
    """The error of a call that could not be sent for ``timeout_s`` seconds."""
    return CallTimeout(
        f"the request was not sent: the queue to the server stayed full for {timeout_s:g} s: is it stopped?"
    )


@uncompiled
class ClientBase(BoundToProcess, Generic[ConnectionT]):
    """What the blocking and the asyncio client share: options, arenas, statistics, and how a connection ends."""

    def __init__(
        self, address: str, options: ClientOptions, counters: Counters, state: ConnectionState[ConnectionT]
    ) -> None:
        self.address = address
        self.scheme = addresses.check_connect(address)
        self._options = options
        self._counters = counters
        self._state = state
        registry.abandon_after_fork(self)

    @property
    def channel(self) -> ChannelKind:
        """The channel that carries the control messages: "zmq" or "doorbell"."""
        return self._options.channel

    @property
    def server_pid(self) -> int:
        """The server's process id, from the kernel."""
        return self._state.live().server_pid

    def empty(
        self, shape: int | Sequence[int], dtype: AnyDType, device: str | torch.device | None = None
    ) -> torch.Tensor:
        """Lend an uninitialised tensor in the request arena, to be sent later without a copy.

        It may be sent several times, and in several calls at once. Its memory is used again once it and all views of
        it are gone, here and at the server.

        Args:
            shape: The size of each dimension, or of the only one.
            dtype: The element type: torch's, numpy's, or the name of one.
            device: "cuda" or "cuda:N" for one on the GPU of a ``Client(device=…)``: in the arena there if the server
                shares it, otherwise in other memory, from which it is copied.

        Raises:
            ArenaFull: No room within the client's ``timeout_s``, or none that waiting could make.
            TensorTooLarge: The tensor exceeds the whole arena.
            LocalProtocolError: No tensor of this shape or dtype can be sent.
            Closed, PeerDied: The connection has ended.
            DeviceError, MemoryError: The GPU has failed, or has too little memory.
        """
        connection = self._state.live()
        if device is not None and (ordinal := cuda_device("device", device)) is not None:
            return tensor_on_device(connection.memory, self._options.device, ordinal, shape, dtype)
        try:
            return connection.memory.send_arena.lend(shape, dtype)
        except Closed:
            self._state.live()  # what another thread has ended it with
            raise

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Lend a tensor with the shape and dtype of another one; see ``empty``."""
        return self.empty(tensor.shape, tensor.dtype)

    def statistics(self) -> Statistics:
        """Return totals since this client was made."""
        return Statistics.of(self._counters)

    def abandon(self) -> None:
        """In a forked child: end without touching what is the parent's."""
        self._state.abandon()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.address}, {self.channel} channel, {CORE} core: {self._state}>"
