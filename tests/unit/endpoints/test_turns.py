"""Which thread receives for all that wait, and who is woken; inner calls are those within a wait of the same thread."""

from __future__ import annotations

import threading

from shmtransport.endpoints.turns import Turns, _Turn
from tests.support.helpers import in_thread


def test_a_turn_that_was_called_before_it_is_waited_for_has_come() -> None:
    """An inner call may come between: what it calls is not lost."""
    turns = Turns()
    with turns.lock:
        turns.followers["mine"] = _Turn()
        assert not turns.call("mine")
        turns.follow("mine", 10.0)
    assert not turns.followers


def test_an_inner_call_receives_in_the_place_of_its_outer_one() -> None:
    """For its own thread the receiver's place is free; for another it is taken."""
    turns = Turns()
    seen: list[bool] = []

    def wait(_timeout_s: float) -> None:
        with turns.lock:
            seen.append(turns.taken())
            turns.wait_as_receiver(
                "inner", lambda _timeout_s: seen.append(turns.received_for == ["outer", "inner"]), 0.0
            )

        def look() -> None:
            with turns.lock:
                seen.append(turns.taken())

        in_thread(look).result(10.0)

    with turns.lock:
        turns.wait_as_receiver("outer", wait, 0.0)
        assert not turns.received_for
    assert seen == [False, True, True]


def test_who_has_followed_longest_takes_over_by_its_innermost_call() -> None:
    """An outer call of that thread can't go on before the inner one has returned."""
    turns = Turns()
    inner_waits, woken = threading.Event(), []

    def inner() -> None:
        with turns.lock:
            inner_waits.set()
            turns.follow("inner", 10.0)
            woken.append("inner")

    def outer() -> None:
        with turns.lock:
            turns.followers["outer"] = _Turn()
            inner()
            del turns.followers["outer"]

    first = in_thread(outer)
    assert inner_waits.wait(10.0)
    with turns.lock:
        turns.hand_over()
    first.result(10.0)
    assert woken == ["inner"]


def test_the_receiver_is_waited_for_by_other_threads_alone() -> None:
    """Who waits for it goes on when it has left; its own thread would wait for itself."""
    turns = Turns()
    may_leave, left = threading.Event(), threading.Event()

    def receive() -> None:
        with turns.lock:
            turns.wait_as_receiver("key", lambda _timeout_s: may_leave.wait(10.0), 0.0)
        left.set()

    receiver = in_thread(receive)
    while not turns.received_for:
        left.wait(0.01)
    threading.Timer(0.05, may_leave.set).start()
    with turns.lock:
        turns.wait_for_receiver()
        assert not turns.received_for
    receiver.result(10.0)
    with turns.lock:
        turns.wait_as_receiver("mine", lambda _timeout_s: turns.wait_for_receiver(), 0.0)
