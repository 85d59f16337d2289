"""Whether a result waits for room or fails, decided while its client releases what it holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shmtransport.core import Counters
from shmtransport.endpoints.connection_memory import ConnectionMemory, segment_layout
from shmtransport.endpoints.deferred import Deferred, encoded
from shmtransport.endpoints.handshake import Admitted, Sizes
from shmtransport.endpoints.server_connection import ServerConnection
from shmtransport.errors import ArenaFull
from shmtransport.memory import send_arena
from shmtransport.memory.segment import Segment
from shmtransport.protocol.messages import Reply
from shmtransport.protocol.values import decode_unread
from shmtransport.units import KIB
from tests.support.interruptions import interruptions

ARENA_BYTES = 64 * KIB


@pytest.fixture
def ends() -> Iterator[tuple[ServerConnection, ConnectionMemory]]:
    """A server's side of a connection, and its client's memory."""
    layout = segment_layout(ARENA_BYTES)
    own, peer = Segment.create(layout), Segment.create(layout)
    attached = [Segment.attach(one.name, layout) for one in (own, peer)]
    server = ConnectionMemory(own, attached[1], Counters(), 4 * KIB)
    client = ConnectionMemory(peer, attached[0], Counters(), 4 * KIB)
    yield ServerConnection(b"key", 1, Admitted(Sizes(ARENA_BYTES, ARENA_BYTES), server), Counters()), client
    client.close()
    server.close()


def test_a_result_fits_once_its_client_holds_nothing_whenever_it_released_that(
    ends: tuple[ServerConnection, ConnectionMemory],
) -> None:
    """Tensors that almost fill the arena find room after a release in the middle of the try that placed the first."""
    connection, client = ends
    result = [torch.full((20 * KIB,), value, dtype=torch.uint8) for value in range(3)]
    for interruption in interruptions(send_arena):
        first = connection.memory.send_arena.export(torch.zeros(10 * KIB, dtype=torch.uint8))
        held = [client.receive_arena.borrow(first)]
        data = interruption.during(lambda: encoded(connection, 1, result), held.clear)
        held.clear()
        if isinstance(data, Deferred):
            data.begin(Counters())
            deferred, data = data, data.encode()
            deferred.end(Counters())
        assert data is not None, interruption.where
        reply = decode_unread(data)
        assert isinstance(reply, Reply)
        client.codec.discard(reply.tensors)


def test_a_result_fails_that_no_release_makes_room_for(ends: tuple[ServerConnection, ConnectionMemory]) -> None:
    """It is larger than the arena in all, and its client holds nothing."""
    connection, _ = ends
    with pytest.raises(ArenaFull):
        encoded(connection, 1, [torch.zeros(40 * KIB, dtype=torch.uint8)] * 2)
    assert connection.memory.send_arena.held_by_peer == 0
