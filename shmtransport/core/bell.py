"""A bell is what one side waits with: until a peer posts, or this process itself.

Each side counts its posts where only it writes: in its segment, those for its peer (see ``message_ring``); in its own
memory, those for itself. A wait blocks while all counts are what they were when posts were last taken. So a post that
comes before the wait keeps it from blocking, and a peer can neither take away nor undo what another has posted.

A bell only says "look again": a peer that posts for nothing costs a look, one that does not post delays its own
messages until the wait ends by itself.
"""

from __future__ import annotations

import ctypes
import time

from .futex import LOOK_S, MOST_WORDS, Word, wait_any
from .message_ring import MessageRing


class Bell:
    """One side's; one thread at a time waits with it."""

    def __init__(self) -> None:
        self._own = Word(ctypes.c_uint32(), is_private=True)

    def post(self) -> None:
        """Wake the thread that waits, or keep the next one from blocking; any thread or signal handler may call it."""
        self._own.post()

    def wait(self, rings: tuple[MessageRing, ...], timeout_s: float) -> bool:
        """Block until this process or the peer of one of the rings posts.

        It returns early on a signal, and where there are more rings than can be waited for.

        Returns:
            Whether there was a post since posts were last taken.
        """
        if self._take(rings):
            return True
        words = [self._own, *(ring.peer_posts for ring in rings[: MOST_WORDS - 1])]
        end = time.monotonic() + (timeout_s if len(rings) < MOST_WORDS else min(timeout_s, LOOK_S))
        while wait_any(words, end - time.monotonic()):
            if self._take(rings):
                return True
        return self._take(rings)

    def _take(self, rings: tuple[MessageRing, ...]) -> bool:
        taken = self._own.take()
        for ring in rings:
            taken = ring.take_post() or taken
        return taken
