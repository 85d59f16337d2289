"""The ways to carry a forward's tensors: the original's, ours, and a memcpy of the same bytes.

Only the transport is measured: arguments are ready before a call, and handlers return results that are ready. They lie
in the arenas if a contender works in place, in private memory otherwise.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import torch
import zmq

from shmtransport import ChannelKind, Client, Server

from ..contenders.floors import faulted_memory
from ..contenders.original import dump, load
from ..contenders.ours import SPIN_US
from .content import RESULT, as_words, check_arguments, write_content
from .workload import DTYPES, OPERATIONS

_MIB = 1 << 20
_ARENA_BYTES = 640 * _MIB  # all operations' arguments, or results, at once, and the largest again for copying in

Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


@dataclass
class Breakdown:
    """Sums of the time that a contender spent, and of the bytes that crossed by ZeroMQ and by shared memory."""

    serialise_s: float = 0.0
    deserialise_s: float = 0.0
    zmq_bytes: int = 0
    shm_bytes: int = 0


class BaselineContender(ABC):
    """One way to carry a forward's tensors, with an object in each process as ``harness.contender`` describes.

    An operation is an index into ``OPERATIONS``.
    """

    has_server = True

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def make_endpoint(self) -> Any:
        """In the client, before the server starts: make what the server needs to be reached."""
        self._address = f"ipc://{self.directory}/s"
        return self._address

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        """In the server: call ``ready``, then answer until a signal raises ``SystemExit``."""
        raise NotImplementedError

    @abstractmethod
    def connect(self) -> None:
        """Connect to the server, which is ready."""

    @abstractmethod
    def load(self, operations: Sequence[int], dtype: str) -> None:
        """Make the arguments of these operations; the server makes a result at the first call of its operation."""

    @abstractmethod
    def call(self, operation: int, check: bool) -> torch.Tensor:
        """Make one call; with ``check`` the server first checks every word of the arguments."""

    @abstractmethod
    def breakdown(self) -> Breakdown:
        """The sums since ``connect``."""

    @abstractmethod
    def close(self) -> None:
        """Release everything."""


def private_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor in private memory."""
    return torch.empty(shape, dtype=dtype)


class ReadyTensors:
    """Arguments and results that are ready to be sent, made by ``empty``; it keeps results of one dtype at a time."""

    def __init__(self, empty: Empty) -> None:
        self._empty = empty
        self._dtype = ""
        self._results: dict[int, torch.Tensor] = {}

    def arguments(self, operation: int, dtype: str) -> list[torch.Tensor]:
        """New arguments of an operation."""
        argument_dtype = torch.int64 if OPERATIONS[operation].ids else DTYPES[dtype]
        tensors = [self._empty(shape, argument_dtype) for shape in OPERATIONS[operation].arguments]
        for place, tensor in enumerate(tensors):
            write_content(tensor, operation, place)
        return tensors

    def result(self, operation: int, dtype: str) -> torch.Tensor:
        """An operation's result, made at the first request."""
        if dtype != self._dtype:
            self._dtype, self._results = dtype, {}
        found = self._results.get(operation)
        if found is None:
            found = self._results[operation] = self._empty(OPERATIONS[operation].result, DTYPES[dtype])
            write_content(found, operation, RESULT)
        return found


class OurContender(BaselineContender):
    """Our transport, over one of its channels."""

    def __init__(self, directory: str, channel: ChannelKind, spin_us: float | None, in_place: bool) -> None:
        super().__init__(directory)
        self._channel: ChannelKind = channel
        self._spin_us = spin_us
        self._in_place = in_place

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        server = Server(endpoint, spin_us=self._spin_us, prefault=True, max_arena_bytes=2 * _ARENA_BYTES + _MIB)
        results = ReadyTensors(self._maker(server))

        @server.method
        def answer(operation: int, dtype: str, check: bool, *arguments: torch.Tensor) -> torch.Tensor:
            if check:
                check_arguments(operation, list(arguments))
            return results.result(operation, dtype)

        with server:
            ready()
            server.serve()

    def _maker(self, side: Client | Server) -> Empty:
        return side.empty if self._in_place else private_empty

    def connect(self) -> None:
        self._client = Client(
            self._address,
            channel=self._channel,
            spin_us=self._spin_us,
            arena_bytes=_ARENA_BYTES,
            prefault=True,
        )

    def load(self, operations: Sequence[int], dtype: str) -> None:
        self._arguments: dict[int, list[torch.Tensor]] = {}  # free the old ones first
        ready = ReadyTensors(self._maker(self._client))
        self._dtype = dtype
        self._arguments = {operation: ready.arguments(operation, dtype) for operation in operations}

    def call(self, operation: int, check: bool) -> torch.Tensor:
        result: torch.Tensor = self._client.call("answer", operation, self._dtype, check, *self._arguments[operation])
        return result

    def breakdown(self) -> Breakdown:
        found = self._client.statistics()
        control = found.control_bytes_sent + found.control_bytes_received
        tensors = found.tensor_bytes_sent + found.tensor_bytes_received
        on_zmq = self._channel == "zmq"
        return Breakdown(
            found.serialize_seconds,
            found.deserialize_seconds,
            control if on_zmq else 0,
            tensors + (0 if on_zmq else control),
        )

    def close(self) -> None:
        self._client.close()


class OriginalContender(BaselineContender):
    """The original's way: msgpack over ZeroMQ's REQ/REP."""

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        results = ReadyTensors(private_empty)
        with zmq.Context() as context, context.socket(zmq.REP) as socket:
            socket.linger = 0
            socket.bind(endpoint)
            ready()
            while True:
                request = msgpack.unpackb(socket.recv())
                arguments = [load(data) for data in request["arguments"]]
                if request["check"]:
                    check_arguments(request["operation"], arguments)
                socket.send(dump(results.result(request["operation"], request["dtype"])))

    def connect(self) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.REQ)
        self._socket.linger = 0
        self._socket.connect(self._address)
        self._breakdown = Breakdown()

    def load(self, operations: Sequence[int], dtype: str) -> None:
        ready = ReadyTensors(private_empty)
        self._dtype = dtype
        self._arguments = {operation: ready.arguments(operation, dtype) for operation in operations}

    def call(self, operation: int, check: bool) -> torch.Tensor:
        started = time.perf_counter()
        arguments = [dump(tensor) for tensor in self._arguments[operation]]
        request = msgpack.packb({"operation": operation, "dtype": self._dtype, "check": check, "arguments": arguments})
        del arguments
        serialised = time.perf_counter()
        self._socket.send(request)
        sent_bytes = len(request)
        del request
        reply = self._socket.recv()
        received = time.perf_counter()
        result = load(reply)
        self._breakdown.serialise_s += serialised - started
        self._breakdown.deserialise_s += time.perf_counter() - received
        self._breakdown.zmq_bytes += sent_bytes + len(reply)
        return result

    def breakdown(self) -> Breakdown:
        return Breakdown(**vars(self._breakdown))

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class MemcpyContender(BaselineContender):
    """A floor: copies the forward's bytes once into mapped shared memory, in this process."""

    has_server = False

    def connect(self) -> None:
        self._place = faulted_memory(_ARENA_BYTES)
        self._bytes = 0

    def load(self, operations: Sequence[int], dtype: str) -> None:
        ready = ReadyTensors(private_empty)
        self._tensors = {}
        for operation in operations:
            arguments = [as_words(tensor) for tensor in ready.arguments(operation, dtype)]
            self._tensors[operation] = (arguments, as_words(ready.result(operation, dtype)))

    def call(self, operation: int, check: bool) -> torch.Tensor:
        arguments, result = self._tensors[operation]
        for array in (*arguments, result):
            np.copyto(self._place[: len(array)], array)
            self._bytes += array.nbytes
        return torch.from_numpy(self._place[: len(result)])

    def breakdown(self) -> Breakdown:
        return Breakdown(shm_bytes=self._bytes)

    def close(self) -> None:
        self._place = np.empty(0, np.int64)


BASELINE_CONTENDERS: dict[str, tuple[Callable[..., BaselineContender], tuple[Any, ...]]] = {
    "doorbell + spin, in place": (OurContender, ("doorbell", SPIN_US, True)),
    "doorbell, default, in place": (OurContender, ("doorbell", None, True)),
    "doorbell, in place": (OurContender, ("doorbell", 0.0, True)),
    "zmq, in place": (OurContender, ("zmq", 0.0, True)),
    "doorbell + spin, copy in": (OurContender, ("doorbell", SPIN_US, False)),
    "doorbell, copy in": (OurContender, ("doorbell", 0.0, False)),
    "zmq, copy in": (OurContender, ("zmq", 0.0, False)),
    "memcpy of the same bytes": (MemcpyContender, ()),
    "original": (OriginalContender, ()),
}
"""By name: the class, and its arguments after the directory."""
