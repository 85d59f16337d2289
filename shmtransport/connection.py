"""What one established connection owns, on either side: segments, arenas, message ring, bells, and the peer's watch."""

from __future__ import annotations

from typing import NamedTuple

from .bell import Bell
from .errors import Closed, PeerDied, PeerProtocolError
from .layout import PAGE_BYTES, Layout, round_up
from .liveness import PeerWatch
from .message_ring import MessageRing, message_ring_bytes
from .protocol import Codec
from .receive_arena import ReceiveArena, release_cells
from .segment import Segment
from .send_arena import SendArena
from .statistics import Counters


def segment_layout(arena_bytes: int, largest_ring_message: int = 0) -> Layout:
    """The layout of a segment whose data area has at least ``arena_bytes`` bytes.

    ``largest_ring_message`` is the largest message in bytes that its message ring must take; 0: it has no ring.
    """
    ring_bytes = message_ring_bytes(largest_ring_message) if largest_ring_message else 0
    return Layout(data_bytes=round_up(max(arena_bytes, 1), PAGE_BYTES), message_ring_bytes=ring_bytes)


class Bells(NamedTuple):
    """What wakes this side, and what wakes the peer."""

    own: Bell
    peer: Bell


class _PeerCheck:
    """What a claim asks while it waits for the peer to release something.

    No method of the connection, which holds the arena that asks: in a cycle the memory of a closed connection would
    stay until the next garbage collection, for ever in a server that has nothing to do.
    """

    def __init__(self, watch: PeerWatch) -> None:
        self._watch = watch
        self.closed = False

    def __call__(self) -> None:
        try:
            alive = self._watch.alive()
        except OSError:  # closed this very moment, by another thread
            alive = False
        if self.closed:  # looked at last: a watch that was closed tells of no peer
            raise Closed("the connection was closed while a claim waited for room")
        if not alive:
            raise PeerDied(f"process {self._watch.pid} ended while a claim waited for it to release results")


class Connection:
    """Both segments of one connection, mapped, and what lies in them.

    ``bells`` are there if requests and replies take the doorbell channel; ``ring`` is its message ring.
    """

    def __init__(
        self,
        own: Segment,
        peer: Segment,
        counters: Counters,
        max_message_bytes: int,
        *,
        bells: Bells | None = None,
        snapshot: bool = False,
        claim_timeout_s: float = 0.0,
    ) -> None:
        self._own = own
        self._peer = peer
        self.bells = bells
        self.ring = None if bells is None else MessageRing(own, peer)
        self.watch = PeerWatch(peer.fd)
        self._peer_check = _PeerCheck(self.watch)
        self.send_arena = SendArena(own, release_cells(peer), counters, claim_timeout_s, self._peer_check)
        self.receive_arena = ReceiveArena(peer, release_cells(own))
        self.codec = Codec(self.send_arena, self.receive_arena, counters, max_message_bytes, snapshot=snapshot)

    def prefault(self) -> None:
        """Enter all pages of both segments into this process's page table."""
        self._own.prefault()
        self._peer.prefault()

    def unlink_own(self) -> None:
        """Remove the name of this side's segment, which the peer has mapped by now."""
        self._own.unlink()

    def check_owner(self, pid: int | None) -> None:
        """Compare the owner of the peer's segment with ``pid``, the process that named it, and remove the name.

        Where either is not known, the name is left for its owner to remove.

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
        """In a forked child: nothing that is done or dies here may reach the parent's connection."""
        self._peer_check.closed = True
        self.receive_arena.abandon()
        self._own.abandon()
        self._peer.abandon()
        if self.bells is not None:
            for bell in self.bells:
                bell.abandon()

    def close(self) -> None:
        """Give the segments back; tensors that still look into them keep their memory."""
        self._peer_check.closed = True
        self.watch.close()
        self._own.close()
        self._peer.close()
        if self.bells is not None:
            self.bells.peer.close()
