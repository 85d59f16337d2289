"""What one established connection owns, on either side: two segments, two arenas, and the watch on its peer."""

from __future__ import annotations

from .arena import ReceiveArena, SendArena, release_cells
from .layout import PAGE_BYTES, Layout, round_up
from .liveness import PeerWatch
from .protocol import Codec
from .segment import Segment
from .statistics import Counters


def segment_layout(arena_bytes: int) -> Layout:
    """The layout of a segment whose data area has at least ``arena_bytes`` bytes."""
    return Layout(data_bytes=round_up(max(arena_bytes, 1), PAGE_BYTES))


class Connection:
    """Both segments of one connection, mapped, and the arenas over them."""

    def __init__(
        self,
        own: Segment,
        peer: Segment,
        counters: Counters,
        max_message_bytes: int,
        *,
        snapshot: bool = False,
    ) -> None:
        self._own = own
        self._peer = peer
        self.watch = PeerWatch(peer.fd)
        self.send_arena = SendArena(own, release_cells(peer), counters)
        self.receive_arena = ReceiveArena(peer, release_cells(own))
        self.codec = Codec(self.send_arena, self.receive_arena, counters, max_message_bytes, snapshot=snapshot)

    def close(self) -> None:
        """Give the segments back; tensors that still look into them keep their memory."""
        self.watch.close()
        self._own.close()
        self._peer.close()
