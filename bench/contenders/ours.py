"""This project's transport, over each of its channels.

*In place* makes the request in ``Client.empty`` and the reply in ``Server.empty``. *Copy in* makes both elsewhere, and
the transport copies them into its arenas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from shmtransport import ChannelKind, Client, PendingReply, Server

from ..harness.contender import Contender, PrivateTensors
from ..harness.content import Words, respond, words

_LARGEST_TENSORS = 4  # that fit into each arena
_SMALLEST_ARENA_BYTES = 4 << 20
SPIN_US = 2000.0


def arena_bytes(max_nbytes: int) -> int:
    """The size of an arena for tensors of at most ``max_nbytes``."""
    return max(_LARGEST_TENSORS * max_nbytes, _SMALLEST_ARENA_BYTES)


Maker = Callable[..., Any]


def tensors_of(make: Maker) -> Maker:
    """What makes tensors, as it is."""
    return make


def arrays_of(make: Maker) -> Maker:
    """What makes arrays over the memory of the tensors that ``make`` makes."""

    def make_array(*arguments: Any) -> Any:
        return make(*arguments).numpy()

    return make_array


class Ours(Contender):
    """What all variants share."""

    group = "ours"
    in_flight = _LARGEST_TENSORS - 1
    channel: ClassVar[ChannelKind] = "zmq"
    spin_us: ClassVar[float | None] = 0.0
    reply = "view, valid while it is held"
    carried = staticmethod(tensors_of)
    """Makes a function that returns what is carried of one that makes tensors."""

    def make_endpoint(self) -> str:
        self._address = f"ipc://{self.directory}/s"
        return self._address

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        server = Server(
            endpoint, spin_us=self.spin_us, prefault=True, max_arena_bytes=2 * arena_bytes(self.max_nbytes) + (1 << 20)
        )
        server.register("answer", self._handler(server))
        with server:
            ready()
            server.serve()

    def _handler(self, server: Server) -> Callable[[Any], Any]:
        raise NotImplementedError

    def connect(self) -> None:
        self._pending: deque[PendingReply] = deque()
        self._client = Client(
            self._address,
            channel=self.channel,
            spin_us=self.spin_us,
            arena_bytes=arena_bytes(self.max_nbytes),
            prefault=True,
        )

    def send(self) -> None:
        self._pending.append(self._client.submit("answer", self._request))

    def receive(self) -> Words:
        reply: Words = self._pending.popleft().result()
        return reply

    def call(self) -> Words:
        reply: Words = self._client.call("answer", self._request)
        return reply

    def close(self) -> None:
        self._client.close()

    _request: Words


class InPlace(Ours):
    """Request and reply are made in the arenas."""

    copies = "0"

    def _handler(self, server: Server) -> Callable[[Any], Any]:
        empty = self.carried(server.empty)

        def answer(request: Words) -> Words:
            reply: Words = empty(request.shape, torch.int64)
            respond(request, reply)
            return reply

        return answer

    def connect(self) -> None:
        super().connect()
        self._empty = self.carried(self._client.empty)

    def prepare(self, nbytes: int) -> Words:
        self._request = self._empty((words(nbytes),), torch.int64)
        return self._request


class CopyIn(Ours):
    """Request and reply are made in private memory."""

    copies = "2: into each arena"

    def _handler(self, server: Server) -> Callable[[Any], Any]:
        following = self.carried(PrivateTensors(1).next)

        def answer(request: Words) -> Words:
            reply: Words = following(request.nbytes)
            respond(request, reply)
            return reply

        return answer

    def connect(self) -> None:
        super().connect()
        self._next = self.carried(PrivateTensors(1).next)  # one will do: sending copies it at once

    def prepare(self, nbytes: int) -> Words:
        self._request = self._next(nbytes)
        return self._request


class ZmqInPlace(InPlace):
    """The default channel, in place."""

    name = "zmq, in place"
    how = "Client.empty, Server.empty, Client.submit; the default channel"


class ZmqCopyIn(CopyIn):
    """The default channel, copying in."""

    name = "zmq, copy in"
    how = "Client.submit of a private tensor; the default channel"


class DoorbellInPlace(InPlace):
    """The doorbell, which blocks at once; in place."""

    name = "doorbell, in place"
    how = 'as "zmq, in place", channel="doorbell", spin_us=0 on both sides'
    channel = "doorbell"


class DoorbellCopyIn(CopyIn):
    """The doorbell, which blocks at once; copying in."""

    name = "doorbell, copy in"
    how = 'as "zmq, copy in", channel="doorbell", spin_us=0 on both sides'
    channel = "doorbell"


class DefaultInPlace(DoorbellInPlace):
    """The doorbell with default settings, which spins while that pays; in place."""

    name = "doorbell, default, in place"
    how = 'as "doorbell, in place", without spin_us'
    spin_us = None


class SpinInPlace(DoorbellInPlace):
    """The doorbell, which spins before it blocks; in place."""

    name = "doorbell + spin, in place"
    how = f'as "doorbell, in place", spin_us={SPIN_US:g} on both sides'
    spin_us = SPIN_US


class SpinCopyIn(DoorbellCopyIn):
    """The doorbell, which spins before it blocks; copying in."""

    name = "doorbell + spin, copy in"
    how = f'as "doorbell, copy in", spin_us={SPIN_US:g} on both sides'
    spin_us = SPIN_US


class SpinArraysInPlace(SpinInPlace):
    """Numpy arrays over memory of the arenas, by the doorbell, which spins before it blocks."""

    name = "doorbell + spin, arrays in place"
    how = 'as "doorbell + spin, in place", with numpy arrays: Client.empty(…).numpy(), Server.empty(…).numpy()'
    reply = "read-only view, valid while it is held"
    carried = staticmethod(arrays_of)


class SpinArraysCopyIn(SpinCopyIn):
    """Numpy arrays of private memory, by the doorbell, which spins before it blocks."""

    name = "doorbell + spin, arrays copy in"
    how = 'as "doorbell + spin, copy in", with numpy arrays'
    reply = "read-only view, valid while it is held"
    carried = staticmethod(arrays_of)
