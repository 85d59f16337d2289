"""What one connection owns on either side: segments, arenas, message rings, the peer's watch."""

from __future__ import annotations

import functools
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core import Counters, MessageRing
from ..core.layout import PAGE_BYTES, Layout, round_up
from ..core.message_ring import message_ring_bytes
from ..cuda.copies import NewCopies
from ..errors import ArenaFull, Closed, DeviceError, LocalProtocolError, PeerDied, PeerProtocolError
from ..memory.dtypes import AnyDType
from ..memory.opening import reason
from ..memory.peer_watch import PeerWatch, runs
from ..memory.plain import row_of, sizes_of
from ..memory.receive_arena import ReceiveArena, release_cells
from ..memory.segment import Segment
from ..memory.send_arena import SendArena
from ..protocol.values import Codec

ASK_INTERVAL_S = 0.5
"""How often to check a peer whose process the kernel does not show to this one, for example in another container."""


def segment_layout(arena_bytes: int, largest_ring_message: int = 0) -> Layout:
    """Return the layout of a segment whose data area has at least ``arena_bytes`` bytes.

    ``largest_ring_message`` is the size in bytes of the largest message that its message ring must take; 0 means that
    it has no message ring.
    """
    ring_bytes = message_ring_bytes(largest_ring_message) if largest_ring_message else 0
    return Layout(data_bytes=round_up(max(arena_bytes, 1), PAGE_BYTES), message_ring_bytes=ring_bytes)


def warn_of_drop(what: str) -> None:
    """Warn that a client or server was dropped without being closed; for the finalizers of both."""
    warnings.warn(
        f"{what} was dropped without being closed: call close(), or use it in a 'with' block",
        ResourceWarning,
        stacklevel=3,
    )


class _PeerCheck:
    """Checks the peer while a claim waits for it to release something.

    Not a method of the connection, which holds the arena that asks: in a cycle, the memory of a closed connection
    would stay until the next garbage collection, which never comes in an idle server.
    """

    def __init__(self, watch: PeerWatch) -> None:
        self._watch = watch
        self.closed = False

    def __call__(self) -> None:
        try:
            alive = self._watch.alive()
        except OSError:  # another thread has just closed it
            alive = False
        if self.closed:  # checked last: a closed watch says nothing about the peer
            raise Closed("the connection was closed while a claim waited for room")
        if not alive:
            raise PeerDied(f"process {self._watch.pid} ended while a claim waited for it to release results")


class ConnectionMemory:
    """Both segments of one connection, mapped, and what they contain.

    Args:
        own: this side's segment.
        peer: the peer's segment.
        counters: where the connection counts.
        max_message_bytes: the limit on the plain values of a call or result, in bytes.
        by_doorbell: whether the connection uses the doorbell channel (default False), for which there is ``ring``.
        snapshot: whether received tensors are copied (default False).
        claim_timeout_s: how long a claim may block, in seconds (default 0).
        new_copies: makes what copies between the arenas and a GPU (default None: there is no GPU).

    Raises:
        DeviceError: the GPU has failed.
    """

    def __init__(
        self,
        own: Segment,
        peer: Segment,
        counters: Counters,
        max_message_bytes: int,
        *,
        by_doorbell: bool = False,
        snapshot: bool = False,
        claim_timeout_s: float = 0.0,
        new_copies: NewCopies | None = None,
    ) -> None:
        self._own = own
        self._cells: Any = None
        self._peer = peer
        self.ring = MessageRing(own.message_ring, peer.message_ring) if by_doorbell else None
        self.watch = PeerWatch(peer.fd)
        self._peer_check = _PeerCheck(self.watch)
        self.copies = None if new_copies is None else new_copies((own.data, peer.data))
        self.send_arena = SendArena(
            own, release_cells(peer), counters, claim_timeout_s, self._peer_check, device=self.copies
        )
        borrow_on_device = None if self.copies is None else self.copies.borrow
        self.receive_arena = ReceiveArena(peer, release_cells(own), borrow_on_device)
        self.codec = Codec(self.send_arena, self.receive_arena, counters, max_message_bytes, snapshot=snapshot)

    def own_cells(self, nbytes: int) -> tuple[int, memoryview]:
        """Return the cells in this side's data area in which it can release something, and their offset.

        Raises:
            ArenaFull: there is no room for them.
        """
        if self._cells is None:
            claim = self.send_arena.loans.claim(nbytes)
            if claim is None:
                raise ArenaFull(f"the arena has no room for {nbytes} bytes of cells")
            self._own.data[claim.offset : claim.offset + nbytes] = bytes(nbytes)
            self._cells = claim
        start = self._cells.offset
        return start, self._own.data[start : start + nbytes].cast("Q")

    def peers_cells(self, offset: int, nbytes: int) -> memoryview:
        """Return the cells that the peer has at an offset of its data area.

        Raises:
            PeerProtocolError: they don't lie there.
        """
        if offset % 8 or not 0 <= offset <= len(self._peer.data) - nbytes:
            raise PeerProtocolError(f"the peer has named cells at {offset}, which do not lie in its data area")
        return self._peer.data[offset : offset + nbytes].cast("Q")

    def prefault(self) -> None:
        """Map all pages of both segments into this process now."""
        self._own.prefault()
        self._peer.prefault()

    @property
    def was_cut(self) -> bool:
        """Whether the peer has cut a segment short, and this side has seen that; results may be made of zeros."""
        return self._peer.was_cut or self._own.was_cut

    def unlink_own(self) -> None:
        """Remove the name of this side's segment, which the peer has mapped by now."""
        self._own.unlink()

    def check_owner(self, pid: int | None) -> None:
        """Check that process ``pid``, which named the peer's segment, owns it; remove the name.

        If either process is unknown, nothing is checked, and the name is left for its owner to remove.

        Raises:
            PeerProtocolError: another process owns it.
        """
        owner = self.watch.pid
        if pid is None or owner <= 0:
            return
        if pid != owner:
            raise PeerProtocolError("the peer gave the name of a segment that another process owns")
        self._peer.unlink_for_owner()

    def abandon(self) -> None:
        """Give up the memory in a forked child; tensors that die there release nothing."""
        self._peer_check.closed = True
        if self.copies is not None:
            self.copies.abandon()
        self.receive_arena.abandon()
        self._own.abandon()
        self._peer.abandon()

    def close(self) -> None:
        """Give the segments back; tensors that still refer to them keep their memory."""
        self._peer_check.closed = True
        if self.copies is not None:
            self.copies.close()
        self.watch.close()
        self._own.close()
        self._peer.close()


def life_of(watch: PeerWatch) -> Callable[[], bool]:
    """Return what tells whether the peer's process lives, also when the watch is closed.

    Raises:
        DeviceError: the kernel does not show the process, or file descriptors are short.
    """
    descriptor = watch.fileno()
    if descriptor is None:
        raise DeviceError("the other process can't be seen from here: is it in another PID namespace?")
    try:
        kept = os.dup(descriptor)
    except OSError as error:
        raise DeviceError(f"the other process can't be watched: {reason(error)}") from error
    lives = functools.partial(runs, kept)
    weakref.finalize(lives, os.close, kept).atexit = False
    return lives


def tensor_on_device(
    memory: ConnectionMemory, used: int | None, asked: int, shape: int | Sequence[int], dtype: AnyDType
) -> torch.Tensor:
    """Make an uninitialised tensor on the GPU that this side uses: in its arena there, if there is one with room.

    Args:
        memory: The connection's.
        used: The number of the GPU that this side uses; None if it uses none.
        asked: The number of the GPU that the tensor is to be on.
        shape: The tensor's.
        dtype: The tensor's.

    Raises:
        LocalProtocolError: It uses another GPU, or none, or can't send such a tensor.
        DeviceError: The GPU has failed.
        MemoryError: It has too little memory.
    """
    copies = memory.copies
    if copies is None or used != asked:
        has = "no GPU" if used is None else f"cuda:{used}"
        raise LocalProtocolError(f"a tensor on cuda:{asked} was asked for, and this side uses {has}: see its device")
    tensor: torch.Tensor = copies.empty(sizes_of(shape), row_of(dtype))
    return tensor
