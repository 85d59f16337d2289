"""Decides which waiting thread receives replies for all of them, and wakes the others.

At most one thread is the *receiver*: it waits for the channel, without the lock. The others follow: each waits for its
*turn*, which comes when its reply has been received or when it has to take over.

A thread may also wait inside a wait of its own: in a signal handler, or in a finalizer that a garbage collection runs.
Such an *inner call* never waits for an outer one, which can't continue until the inner call has returned. If the outer
call is the receiver, the inner call receives in its place. If a thread has to take over, its innermost call is woken.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ..core import CallState

Result = TypeVar("Result")


class _Turn:
    """What a following thread waits for. Once called it stays called, since inner calls may intervene."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._not_called = threading.Lock()
        self._not_called.acquire()

    def call(self) -> None:
        """Wake all threads that wait for this turn."""
        with contextlib.suppress(RuntimeError):  # it has been called already
            self._not_called.release()

    def wait(self, timeout_s: float) -> None:
        """Wait until this turn is called, for up to ``timeout_s`` seconds."""
        if self._not_called.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX)):
            self.call()  # another thread may wait for the same turn


class Turns:
    """The receiver and its followers. Every method is called with ``lock`` held, unless it says otherwise."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.received_for: list[object] = []
        """The keys that the receiver waits for, its innermost call's last; empty if there is no receiver."""
        self._receiving_thread = 0
        self._receiver_left = threading.Condition(self.lock)
        self._waiting_for_receiver = 0
        self.followers: dict[object, _Turn] = {}
        """The turns of those that wait while another thread receives, by their keys."""
        # As in threading.Condition: they release and restore the lock however often its thread has acquired it.
        self._release: Callable[[], Any] = self.lock._release_save  # type: ignore[attr-defined]  # noqa: SLF001
        self._restore: Callable[[Any], None] = self.lock._acquire_restore  # type: ignore[attr-defined]  # noqa: SLF001
        self._is_owned: Callable[[], bool] = self.lock._is_owned  # type: ignore[attr-defined]  # noqa: SLF001

    def taken(self) -> bool:
        """Return whether another thread is the receiver."""
        return bool(self.received_for) and self._receiving_thread != threading.get_ident()

    def wait_as_receiver(self, key: object, wait: Callable[[float], Result], timeout_s: float) -> Result:
        """Wait as the receiver, without the lock; return what ``wait(timeout_s)`` returns.

        Args:
            key: what this call waits for.
            wait: waits for the channel.
            timeout_s: how long it may wait, in seconds.
        """
        self._receiving_thread = threading.get_ident()  # first, so that an inner call of this thread finds it
        self.received_for.append(key)
        depth = self._release()
        try:
            return wait(timeout_s)
        finally:
            self._restore(depth)
            self.received_for.pop()
            self._tell_of_leaving()

    def begin_receiving(self, call: CallState) -> bool:
        """Become the only receiver, for a direct call, without the lock; ``end_receiving`` must follow in any case.

        Returns:
            False, with nothing done, if another call receives, follows or holds the lock, or this one is ready.
        """
        if self._is_owned() or not self.lock.acquire(blocking=False):
            return False
        try:
            if self.received_for or self.followers or call.ready:
                return False
            self._receiving_thread = threading.get_ident()
            self.received_for.append(call)
            return True
        finally:
            self.lock.release()

    def end_receiving(self, call: CallState) -> None:
        """Receive for a direct call no longer; called without the lock. A second call does nothing."""
        with self.lock:
            if call in self.received_for:
                self.received_for.remove(call)
            self._tell_of_leaving()

    def _tell_of_leaving(self) -> None:
        if self._waiting_for_receiver and not self.received_for:
            self._receiver_left.notify_all()

    def follow(self, key: object, timeout_s: float) -> None:
        """Wait for a turn, without the lock, for up to ``timeout_s`` seconds."""
        turn = self.followers.setdefault(key, _Turn())
        depth = self._release()
        try:
            turn.wait(timeout_s)
        finally:
            self._restore(depth)
            if self.followers.get(key) is turn:
                del self.followers[key]
                turn.call()  # another thread may wait for the same turn

    def hand_over(self) -> None:
        """Let the thread that has followed longest receive from now on, in its innermost call."""
        if self.followers and not self.received_for:
            turns = list(self.followers.values())
            for innermost in [turn for turn in turns if turn.thread == turns[0].thread][-1:]:
                innermost.call()

    def call(self, key: object) -> bool:
        """Call the turn of ``key``; return whether it is the receiver's, to be woken by its channel."""
        turn = self.followers.get(key)
        if turn is not None:
            turn.call()
        return key in self.received_for

    def call_all(self) -> None:
        """Call the turns of all followers."""
        for turn in list(self.followers.values()):
            turn.call()

    def wait_for_receiver(self) -> None:
        """Wait until no other thread is the receiver."""
        self._waiting_for_receiver += 1
        try:
            while self.taken():
                self._receiver_left.wait()
        finally:
            self._waiting_for_receiver -= 1
