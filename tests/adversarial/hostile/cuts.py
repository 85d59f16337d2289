"""Connected clients that cut segments short, which would end a server that reads or writes there without guards."""

from __future__ import annotations

import os

from .intrusions import carrying, descriptor
from .scene import BOTH, Scene, attack


@attack(*BOTH)
def an_argument_that_was_cut_off(scene: Scene) -> None:
    """A client's own segment ends before the tensor that its call names."""
    for nbytes in (0, 4096):
        one = scene.impostor()
        os.truncate(one.segment.fd, one.layout.data_offset + nbytes)
        one.send(carrying(descriptor(offset=nbytes, shape=(4096,))))
        one.assert_dropped()


@attack(*BOTH)
def a_reply_arena_that_was_cut_off(scene: Scene) -> None:
    """The server's own segment, which its client has open, ends before its data."""
    one = scene.impostor()
    os.truncate(one.replies.fd, one.layout.data_offset)
    one.send(carrying(descriptor(shape=(4096,))))
    one.assert_dropped()


@attack("doorbell")
def a_ring_that_was_cut_off(scene: Scene) -> None:
    """Nothing is left of a client's segment, its messages included."""
    one = scene.impostor()
    one.assert_served()
    os.truncate(one.segment.fd, 0)
    one.forger.post()
    one.assert_dropped()
