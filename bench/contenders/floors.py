"""Floors: how long the machine takes to wake another process, or to copy a tensor's bytes.

None of them is a way to call; they show what the contenders' figures consist of.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import posix_ipc
import torch
import zmq

from ..harness.contender import Contender, PrivateTensors
from ..harness.content import respond, words
from .sockets import Sockets

REQUEST_BYTES, REPLY_BYTES = 35, 27
"""The control messages of our call with one tensor each way; a test compares them with what is sent."""

_NOTHING = torch.empty(0, dtype=torch.int64)
_LINE_WORDS = 16  # two cache lines, since processors fetch neighbours in pairs
_WAIT_S = 0.25  # then Python handles signals, which don't end a wait
_LOOKS = 1 << 20  # between checks that the client still runs


class _Signal(Contender):
    """A floor that carries no tensor."""

    group = "floor"
    copies = "–"
    reply = "none"
    moves_tensors = False

    def prepare(self, nbytes: int) -> torch.Tensor:
        return _NOTHING

    def receive(self) -> torch.Tensor:
        self.wait()
        return _NOTHING

    def wait(self) -> None:
        """Wait until the other side has answered."""
        raise NotImplementedError

    def close(self) -> None:
        pass


class SemaphorePingPong(_Signal):
    """Two POSIX semaphores: each side blocks until the other posts."""

    name = "semaphore ping-pong"
    how = "posix_ipc, two semaphores, both sides block"

    def make_endpoint(self) -> Any:
        stem = "/" + self.directory.rpartition("/")[2]
        names = f"{stem}-there", f"{stem}-back"
        self._there, self._back = (posix_ipc.Semaphore(name, posix_ipc.O_CREX) for name in names)
        return names

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        there, back = (posix_ipc.Semaphore(name) for name in endpoint)
        ready()
        while True:
            with contextlib.suppress(posix_ipc.BusyError):
                there.acquire(_WAIT_S)
                back.release()

    def connect(self) -> None:
        self._there.unlink()
        self._back.unlink()

    def send(self) -> None:
        self._there.release()

    def wait(self) -> None:
        self._back.acquire()


class CacheLinePingPong(_Signal):
    """Two cells in shared memory: each side spins on one until it changes, and writes the other."""

    name = "cache-line ping-pong"
    how = "two cells in shared memory, both sides spin in Python"

    def make_endpoint(self) -> str:
        path = f"{self.directory}/cells"
        with open(path, "wb") as file:
            file.write(bytes(mmap.PAGESIZE))
        return path

    @staticmethod
    def _cells(path: str) -> memoryview:
        with open(path, "r+b") as file:
            return memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        cells = self._cells(endpoint)
        parent = os.getppid()
        seen = 0
        ready()
        while os.getppid() == parent:
            for _ in range(_LOOKS):
                if cells[0] != seen:
                    seen = cells[_LINE_WORDS] = cells[0]

    def connect(self) -> None:
        self._memory = self._cells(f"{self.directory}/cells")
        self._turn = 0

    def send(self) -> None:
        self._turn += 1
        self._memory[0] = self._turn

    def wait(self) -> None:
        memory, turn = self._memory, self._turn
        while memory[_LINE_WORDS] != turn:
            pass


class _BareSockets(Sockets, _Signal):
    """A round trip of as many bytes as one of our calls sends."""

    packages = (("zmq", "pyzmq"),)
    request: ClassVar[bytes] = bytes(REQUEST_BYTES)

    def send(self) -> None:
        self._socket.send(self.request)

    def wait(self) -> None:
        self._socket.recv()


class RequestReplyFloor(_BareSockets):
    """The socket types that the original uses."""

    name = "pyzmq REQ/REP, no tensor"
    how = f"{REQUEST_BYTES} bytes there, {REPLY_BYTES} back, over ipc"

    def answer(self, socket: zmq.Socket[bytes]) -> None:
        socket.send(socket.recv()[:REPLY_BYTES])


class DealerRouterFloor(_BareSockets):
    """The socket types that our zmq channel uses."""

    name = "pyzmq DEALER/ROUTER, no tensor"
    how = f"{REQUEST_BYTES} bytes there, {REPLY_BYTES} back, over ipc"
    client_socket_type = zmq.DEALER
    server_socket_type = zmq.ROUTER

    def answer(self, socket: zmq.Socket[bytes]) -> None:
        client_key, request = socket.recv_multipart()
        socket.send_multipart((client_key, request[:REPLY_BYTES]))


class MemcpyFloor(Contender):
    """The two copies that copying in needs: private tensors into mapped shared memory, in one process."""

    name = "memcpy there and back"
    group = "floor"
    how = "two memcpys into mapped shared memory, in one process, without a message"
    copies = "2"
    reply = "overwritten by the next call"
    has_server = False

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        raise NotImplementedError("the memcpy floor has no server")

    def connect(self) -> None:
        self._places = [faulted_memory(self.max_nbytes) for _ in range(2)]
        self._requests, self._replies = PrivateTensors(1), PrivateTensors(1)

    def prepare(self, nbytes: int) -> torch.Tensor:
        self._count = words(nbytes)
        self._request = self._requests.next(nbytes)
        return self._request

    def send(self) -> None:
        np.copyto(self._places[0][: self._count], self._request.numpy())

    def receive(self) -> torch.Tensor:
        there, back = (place[: self._count] for place in self._places)
        reply = self._replies.next(8 * self._count)
        respond(torch.from_numpy(there), reply)
        np.copyto(back, reply.numpy())
        return torch.from_numpy(back)

    def close(self) -> None:
        self._places.clear()


def faulted_memory(nbytes: int) -> np.ndarray[Any, Any]:
    """Shared memory as an array of words, with every page mapped."""
    array = np.frombuffer(mmap.mmap(-1, nbytes), np.int64)  # the kernel's tmpfs, as POSIX shared memory is
    array[:] = 0
    return array
