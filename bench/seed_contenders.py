"""How a forward's tensors are carried: the original's way, ours, and a memcpy of the same bytes.

Only the transport is measured: the arguments are ready before a call, and the handlers give results that are ready.
"Ready" is where the way wants it: in place, in the arenas; else in private memory.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import torch
import zmq

from shmtransport import ChannelKind, Client, Server

from .contenders.floors import faulted_memory
from .contenders.original import dump, load
from .contenders.ours import SPIN_US
from .seed_workload import DTYPES, KINDS, Kind

_MIB = 1 << 20
_ARENA_BYTES = 640 * _MIB  # all kinds' arguments, or results, at once, and one more of the largest for copying in
_RESULT = 1 << 16  # tells results from arguments in their content

Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


@dataclass
class Parts:
    """Where a forward's time went, and what it sent through what; sums."""

    serialise_s: float = 0.0
    deserialise_s: float = 0.0
    zmq_bytes: int = 0
    shm_bytes: int = 0


class SeedContender(ABC):
    """One way; ``client`` and ``server`` halves as in ``contenders.base``."""

    has_server = True

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def link(self) -> Any:
        """What the server is given."""
        self._address = f"ipc://{self.directory}/s"
        return self._address

    def serve(self, link: Any, ready: Callable[[], None]) -> None:
        """In the server's process."""
        raise NotImplementedError

    @abstractmethod
    def connect(self) -> None:
        """In the client's process."""

    @abstractmethod
    def load(self, kinds: tuple[Kind, ...], dtype: str) -> None:
        """Make the arguments of these kinds ready, as the server will make its results at the first call of a kind."""

    @abstractmethod
    def call(self, kind: int, check: bool) -> torch.Tensor:
        """Call by a kind's number; with ``check`` the server looks at every word of the arguments first."""

    @abstractmethod
    def parts(self) -> Parts:
        """Sums since ``connect``."""

    @abstractmethod
    def close(self) -> None:
        """The end."""


class Ready:
    """Tensors that are ready to be sent, by kind: of one dtype at a time."""

    def __init__(self, empty: Empty) -> None:
        self._empty = empty
        self._dtype = ""
        self._results: dict[int, torch.Tensor] = {}

    def arguments(self, kind: int, dtype: str) -> list[torch.Tensor]:
        """New arguments of a kind."""
        of = torch.int64 if KINDS[kind].ids else DTYPES[dtype]
        made = [self._empty(shape, of) for shape in KINDS[kind].arguments]
        for place, tensor in enumerate(made):
            write_content(tensor, kind, place)
        return made

    def result(self, kind: int, dtype: str) -> torch.Tensor:
        """A kind's result, made when it is first asked for."""
        if dtype != self._dtype:
            self._dtype, self._results = dtype, {}
        found = self._results.get(kind)
        if found is None:
            found = self._results[kind] = self._empty(KINDS[kind].result, DTYPES[dtype])
            write_content(found, kind, _RESULT)
        return found


def as_words(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bytes of a tensor, eight at a time."""
    array: np.ndarray[Any, Any] = tensor.reshape(-1).view(torch.int64).numpy()
    return array


def content(count: int, kind: int, place: int) -> np.ndarray[Any, Any]:
    """The words of an argument, by its place, or of a result: different in each word of each tensor."""
    return np.arange(count, dtype=np.int64) + ((kind << 20 | place) << 32)


def write_content(tensor: torch.Tensor, kind: int, place: int) -> None:
    """Fill a tensor with what it is to carry."""
    array = as_words(tensor)
    array[:] = content(len(array), kind, place)


def has_content(tensor: torch.Tensor, kind: int, place: int) -> bool:
    """Whether every word is as it was filled."""
    array = as_words(tensor)
    return bool(np.array_equal(array, content(len(array), kind, place)))


def check_result(tensor: torch.Tensor, kind: int, dtype: str) -> None:
    """Look at a result's size and at its first, middle and last word.

    Raises:
        RuntimeError: it is not what the server had ready.
    """
    array = as_words(tensor)
    first = (kind << 20 | _RESULT) << 32
    wanted = [first, first + len(array) // 2, first + len(array) - 1]
    found = [int(array[place]) for place in (0, len(array) // 2, -1)]
    if array.nbytes != KINDS[kind].received_bytes(DTYPES[dtype]) or found != wanted:
        raise RuntimeError(f"wrong result of {KINDS[kind].method}")


def check_whole_result(tensor: torch.Tensor, kind: int, dtype: str) -> None:
    """As ``check_result``, every word."""
    check_result(tensor, kind, dtype)
    if not has_content(tensor, kind, _RESULT):
        raise RuntimeError(f"wrong words in the result of {KINDS[kind].method}")


def check_arguments(kind: int, arguments: list[torch.Tensor]) -> None:
    """In the server's process: look at every word.

    Raises:
        RuntimeError: an argument is not what was sent.
    """
    for place, tensor in enumerate(arguments):
        if not has_content(tensor, kind, place):
            raise RuntimeError(f"wrong argument of {KINDS[kind].method}")


class SeedOurs(SeedContender):
    """Our transport."""

    def __init__(self, directory: str, channel: ChannelKind, spin_us: float, in_place: bool) -> None:
        super().__init__(directory)
        self._channel: ChannelKind = channel
        self._spin_us = spin_us
        self._in_place = in_place

    def serve(self, link: Any, ready: Callable[[], None]) -> None:
        server = Server(link, spin_us=self._spin_us, prefault=True, max_arena_bytes=2 * _ARENA_BYTES + _MIB)
        results = Ready(self._maker(server))

        @server.method
        def answer(kind: int, dtype: str, check: bool, *arguments: torch.Tensor) -> torch.Tensor:
            if check:
                check_arguments(kind, list(arguments))
            return results.result(kind, dtype)

        with server:
            ready()
            server.serve()

    def _maker(self, side: Client | Server) -> Empty:
        if self._in_place:
            return side.empty
        return lambda shape, dtype: torch.empty(shape, dtype=dtype)

    def connect(self) -> None:
        self._client = Client(
            self._address,
            channel=self._channel,
            spin_us=self._spin_us,
            arena_bytes=_ARENA_BYTES,
            prefault=True,
        )

    def load(self, kinds: tuple[Kind, ...], dtype: str) -> None:
        self._arguments: dict[int, list[torch.Tensor]] = {}  # the old ones' room first
        ready = Ready(self._maker(self._client))
        self._dtype = dtype
        self._arguments = {KINDS.index(kind): ready.arguments(KINDS.index(kind), dtype) for kind in kinds}

    def call(self, kind: int, check: bool) -> torch.Tensor:
        result: torch.Tensor = self._client.call("answer", kind, self._dtype, check, *self._arguments[kind])
        return result

    def parts(self) -> Parts:
        found = self._client.statistics()
        control = found.control_bytes_sent + found.control_bytes_received
        tensors = found.tensor_bytes_sent + found.tensor_bytes_received
        on_zmq = self._channel == "zmq"
        return Parts(
            found.serialize_seconds,
            found.deserialize_seconds,
            control if on_zmq else 0,
            tensors + (0 if on_zmq else control),
        )

    def close(self) -> None:
        self._client.close()


class SeedOriginal(SeedContender):
    """msgpack over REQ/REP."""

    def serve(self, link: Any, ready: Callable[[], None]) -> None:
        results = Ready(lambda shape, dtype: torch.empty(shape, dtype=dtype))
        with zmq.Context() as context, context.socket(zmq.REP) as socket:
            socket.linger = 0
            socket.bind(link)
            ready()
            while True:
                request = msgpack.unpackb(socket.recv())
                arguments = [load(data) for data in request["arguments"]]
                if request["check"]:
                    check_arguments(request["kind"], arguments)
                socket.send(dump(results.result(request["kind"], request["dtype"])))

    def connect(self) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.REQ)
        self._socket.linger = 0
        self._socket.connect(self._address)
        self._parts = Parts()

    def load(self, kinds: tuple[Kind, ...], dtype: str) -> None:
        ready = Ready(lambda shape, of: torch.empty(shape, dtype=of))
        self._dtype = dtype
        self._arguments = {KINDS.index(kind): ready.arguments(KINDS.index(kind), dtype) for kind in kinds}

    def call(self, kind: int, check: bool) -> torch.Tensor:
        started = time.perf_counter()
        arguments = [dump(tensor) for tensor in self._arguments[kind]]
        request = msgpack.packb({"kind": kind, "dtype": self._dtype, "check": check, "arguments": arguments})
        del arguments
        serialised = time.perf_counter()
        self._socket.send(request)
        sent_bytes = len(request)
        del request
        reply = self._socket.recv()
        received = time.perf_counter()
        result = load(reply)
        self._parts.serialise_s += serialised - started
        self._parts.deserialise_s += time.perf_counter() - received
        self._parts.zmq_bytes += sent_bytes + len(reply)
        return result

    def parts(self) -> Parts:
        return Parts(**vars(self._parts))

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class SeedMemcpy(SeedContender):
    """A floor: the forward's bytes copied once into shared memory that is mapped already, in this process."""

    has_server = False

    def connect(self) -> None:
        self._place = faulted_memory(_ARENA_BYTES)
        self._bytes = 0

    def load(self, kinds: tuple[Kind, ...], dtype: str) -> None:
        ready = Ready(lambda shape, of: torch.empty(shape, dtype=of))
        self._tensors = {}
        for kind in kinds:
            number = KINDS.index(kind)
            arguments = [as_words(tensor) for tensor in ready.arguments(number, dtype)]
            self._tensors[number] = (arguments, as_words(ready.result(number, dtype)))

    def call(self, kind: int, check: bool) -> torch.Tensor:
        arguments, result = self._tensors[kind]
        for array in (*arguments, result):
            np.copyto(self._place[: len(array)], array)
            self._bytes += array.nbytes
        return torch.from_numpy(self._place[: len(result)])

    def parts(self) -> Parts:
        return Parts(shm_bytes=self._bytes)

    def close(self) -> None:
        self._place = np.empty(0, np.int64)


SEED_CONTENDERS: dict[str, tuple[Callable[..., SeedContender], tuple[Any, ...]]] = {
    "doorbell + spin, in place": (SeedOurs, ("doorbell", SPIN_US, True)),
    "doorbell, in place": (SeedOurs, ("doorbell", 0.0, True)),
    "zmq, in place": (SeedOurs, ("zmq", 0.0, True)),
    "doorbell + spin, copy in": (SeedOurs, ("doorbell", SPIN_US, False)),
    "doorbell, copy in": (SeedOurs, ("doorbell", 0.0, False)),
    "zmq, copy in": (SeedOurs, ("zmq", 0.0, False)),
    "memcpy of the same bytes": (SeedMemcpy, ()),
    "original": (SeedOriginal, ()),
}
"""By name: what makes it, and with which arguments after the directory."""
