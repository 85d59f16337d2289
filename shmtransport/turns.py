"""Which of the threads that wait for replies receives for all of them, and how the others are woken.

At any time one of them is the *receiver*: it waits for the channel, without the lock. The others follow: each waits
for its *turn*, which comes when its reply has been received, or when it is to take over.

A thread may also wait within a wait of its own: in a signal handler, or in a finalizer that a garbage collection runs.
Such an inner call never waits for an outer one, which can't go on before it has returned. It receives in the place of
an outer one that is the receiver, and of its thread's calls it is the one that is woken to take over.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Turn:
    """What a following thread waits for. Once called, it stays called: an inner call may come between."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._not_called = threading.Lock()
        self._not_called.acquire()

    def call(self) -> None:
        """Wake all threads that wait for it."""
        with contextlib.suppress(RuntimeError):  # it was called before
            self._not_called.release()

    def wait(self, timeout_s: float) -> None:
        """Wait until it is called, for up to ``timeout_s`` seconds."""
        if self._not_called.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX)):
            self.call()  # another thread may wait for the same call


class Turns:
    """The receiver and its followers. Every method is called with ``lock`` held."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.received_for: list[object] = []
        """What the receiver waits for, an inner call's after its outer one's; empty where there is no receiver."""
        self._receiving_thread = 0
        self._receiver_left = threading.Condition(self.lock)
        self._waiting_for_receiver = 0
        self._followers: dict[object, _Turn] = {}
        # As threading.Condition does: these give the lock away, and take it back, however often a thread has it.
        self._release: Callable[[], Any] = self.lock._release_save  # type: ignore[attr-defined]  # noqa: SLF001
        self._restore: Callable[[Any], None] = self.lock._acquire_restore  # type: ignore[attr-defined]  # noqa: SLF001

    def taken(self) -> bool:
        """Whether another thread is the receiver."""
        return bool(self.received_for) and self._receiving_thread != threading.get_ident()

    def receive(self, key: object, wait: Callable[[float], Result], timeout_s: float) -> Result:
        """As the receiver, wait for ``key`` by ``wait(timeout_s)``, without the lock; what that returns."""
        self._receiving_thread = threading.get_ident()  # first: an inner call of this thread must find it
        self.received_for.append(key)
        depth = self._release()
        try:
            return wait(timeout_s)
        finally:
            self._restore(depth)
            self.received_for.pop()
            if self._waiting_for_receiver and not self.received_for:
                self._receiver_left.notify_all()

    def follow(self, key: object, timeout_s: float) -> None:
        """Wait for a turn, without the lock, for up to ``timeout_s`` seconds."""
        turn = self._followers.setdefault(key, _Turn())
        depth = self._release()
        try:
            turn.wait(timeout_s)
        finally:
            self._restore(depth)
            if self._followers.get(key) is turn:
                del self._followers[key]
                turn.call()  # several threads may wait for one call

    def hand_over(self) -> None:
        """This thread will not receive any more: let the one that has followed longest do it, by its innermost call."""
        if self._followers and not self.received_for:
            turns = list(self._followers.values())
            for innermost in [turn for turn in turns if turn.thread == turns[0].thread][-1:]:
                innermost.call()

    def call(self, key: object) -> bool:
        """Give its turn to what waits for ``key``; whether that is the receiver, which its channel must wake."""
        turn = self._followers.get(key)
        if turn is not None:
            turn.call()
        return key in self.received_for

    def call_all(self) -> None:
        """Give all followers their turns."""
        for turn in list(self._followers.values()):
            turn.call()

    def wait_for_receiver(self) -> None:
        """Wait until there is no receiver; an outer call of this very thread is not waited for."""
        self._waiting_for_receiver += 1
        try:
            while self.taken():
                self._receiver_left.wait()
        finally:
            self._waiting_for_receiver -= 1
