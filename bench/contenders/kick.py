"""kickmsg: slots in shared memory, published to one subscriber each way.

*Polling* calls ``try_receive_view`` in a loop; *waiting* blocks in ``receive_view``.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ..harness.contender import Contender, PrivateTensors
from ..harness.content import respond, view

_IN_FLIGHT = 2
_RING_SLOTS = 2  # of kickmsg's subscriber ring, a power of two; a slot stays taken while the ring refers to it
_SLOTS = _RING_SLOTS + _IN_FLIGHT + 2  # one being read and one being written; few, so that they stay in cache
_WAIT = datetime.timedelta(seconds=0.25)  # then Python handles signals


class _Side:
    """One side: a publisher and a subscriber; whichever side comes first creates the topics."""

    def __init__(self, directory: str, max_nbytes: int, mine: str, theirs: str, waits: bool) -> None:
        import kickmsg

        config = kickmsg.Config()
        config.max_subscribers = 1
        config.sub_ring_capacity = _RING_SLOTS
        config.pool_size = _SLOTS
        config.max_payload_size = max_nbytes
        self._namespace = directory.rpartition("/")[2]
        self._node = kickmsg.Node(mine, self._namespace)
        self._subscriber = self._node.subscribe_or_create(theirs, config)
        self._publisher = self._node.advertise_or_join(mine, config)
        self._waits = waits

    def allocate(self, nbytes: int) -> tuple[Any, torch.Tensor]:
        """A slot to write, and a tensor over the part of it that will be sent.

        Raises:
            RuntimeError: All slots are taken.
        """
        slot = self._publisher.allocate()
        if slot is None:
            raise RuntimeError(f"all {_SLOTS} slots of kickmsg's pool are taken: a sample was not released")
        return slot, view(memoryview(slot)[:nbytes])

    def take(self) -> tuple[Any, torch.Tensor]:
        """The next sample, and a tensor over it."""
        if self._waits:
            while (sample := self._subscriber.receive_view(_WAIT)) is None:
                pass
        else:
            while (sample := self._subscriber.try_receive_view()) is None:
                pass
        return sample, view(memoryview(sample))

    def unlink(self) -> None:
        """Remove the names of both topics and of the namespace's registry."""
        import kickmsg

        for topic in ("requests", "replies"):
            self._node.unlink_topic(topic)
        kickmsg.Registry.unlink(self._namespace)


class Kick(Contender):
    """What the four variants share."""

    packages = (("kickmsg", "kickmsg"),)
    in_flight = _IN_FLIGHT
    reply = "read-only view of a slot, valid until the slot is released"
    waits: ClassVar[bool] = False
    in_place: ClassVar[bool] = True

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        side = _Side(self.directory, self.max_nbytes, "replies", "requests", self.waits)
        tensors = PrivateTensors(1)
        ready()
        while True:
            received, request = side.take()
            nbytes = request.nbytes
            slot, place = side.allocate(nbytes)
            reply = place if self.in_place else tensors.next(nbytes)
            respond(request, reply)
            if not self.in_place:
                place.numpy()[:] = reply.numpy()
            slot.publish(nbytes)
            received.release()

    def connect(self) -> None:
        self._side = _Side(self.directory, self.max_nbytes, "requests", "replies", self.waits)
        self._tensors = PrivateTensors(1)
        self._received: Any = None

    def prepare(self, nbytes: int) -> torch.Tensor:
        if self.in_place:
            self._slot, self._request = self._side.allocate(nbytes)
        else:
            self._request = self._tensors.next(nbytes)
        return self._request

    def send(self) -> None:
        nbytes = self._request.nbytes
        if not self.in_place:
            self._slot, place = self._side.allocate(nbytes)
            place.numpy()[:] = self._request.numpy()
        self._slot.publish(nbytes)

    def receive(self) -> torch.Tensor:
        if self._received is not None:
            self._received.release()
        self._received, reply = self._side.take()
        return reply

    def close(self) -> None:
        if self._received is not None:
            self._received.release()
        self._side.unlink()


class KickPollingInPlace(Kick):
    """Both sides poll; tensors are made in slots."""

    name = "kickmsg polling, in place"
    how = "a topic each way, allocate and publish, try_receive_view in a loop"
    copies = "0"


class KickPollingCopyIn(Kick):
    """Both sides poll; tensors are copied into slots."""

    name = "kickmsg polling, copy in"
    how = "the same, tensors copied into allocated slots"
    copies = "2: into each slot"
    in_place = False


class KickWaitingInPlace(Kick):
    """Both sides block; tensors are made in slots."""

    name = "kickmsg waiting, in place"
    how = 'as "kickmsg polling, in place", but with receive_view, which blocks'
    copies = "0"
    waits = True


class KickWaitingCopyIn(Kick):
    """Both sides block; tensors are copied into slots."""

    name = "kickmsg waiting, copy in"
    how = "the same, tensors copied into allocated slots"
    copies = "2: into each slot"
    waits = True
    in_place = False
