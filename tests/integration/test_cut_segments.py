"""A segment that was cut short costs its connection, and no process."""

from __future__ import annotations

import os

import pytest
import torch

from shmtransport import Client, PeerDied, PeerProtocolError
from shmtransport.core import Counters
from shmtransport.endpoints.connection_memory import ConnectionMemory, segment_layout
from shmtransport.memory.mapped_file import guards_are_on
from shmtransport.memory.segment import Segment
from shmtransport.protocol.messages import ChannelKind, Reply
from shmtransport.protocol.values import decode_unread
from shmtransport.units import KIB
from tests.support.helpers import Spawn, start_server

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not guards_are_on(), reason="there is no compiled core"),
]


CUT = pytest.raises((PeerProtocolError, PeerDied))  # whichever side sees it first


@pytest.mark.parametrize("which", ["own", "peer"])
@pytest.mark.parametrize("snapshot", [False, True])
def test_no_call_succeeds_on_a_segment_that_was_cut(
    spawn: Spawn, address: str, channel: ChannelKind, snapshot: bool, which: str
) -> None:
    """Neither process ends; a view that was held shows zeros; the server serves the next client."""
    start_server(spawn, address)
    with Client(address, channel=channel, snapshot=snapshot) as client:
        tensor = torch.ones(64 * KIB, dtype=torch.uint8)
        held = client.call("echo", tensor)
        connection = client._exchange.connection
        assert connection is not None
        segment = connection.memory._own if which == "own" else connection.memory._peer
        os.ftruncate(segment.fd, segment.layout.data_offset)
        assert bool(held.any()) == (snapshot or which == "own")
        for _ in range(2):
            with CUT:
                client.call("echo", tensor)
    with Client(address, channel=channel) as client:
        assert bool(client.call("echo", tensor).all())


def test_a_snapshot_of_zeros_is_never_handed_out() -> None:
    """The copy is made first, and then looked whether it was the peer's."""
    layout = segment_layout(64 * KIB)
    own, peer = Segment.create(layout), Segment.create(layout)
    server = ConnectionMemory(own, Segment.attach(peer.name, layout), Counters(), 4 * KIB)
    client = ConnectionMemory(peer, Segment.attach(own.name, layout), Counters(), 4 * KIB, snapshot=True)
    reply = decode_unread(server.codec.encode_reply(1, torch.ones(KIB)))
    assert isinstance(reply, Reply)
    os.ftruncate(own.fd, layout.data_offset)
    with pytest.raises(PeerProtocolError, match="cut its segment short"):
        client.codec.result_of(reply, 0, 0.0)
    client.close()
    server.close()
