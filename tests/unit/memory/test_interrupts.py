"""Whatever interrupts the making of a message, and wherever: nothing stays claimed or held."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from shmtransport.core import allocator, borrows, loans
from shmtransport.errors import Closed
from shmtransport.memory import receive_arena, send_arena, views
from shmtransport.protocol import calls, values
from shmtransport.protocol.calls import ClientProtocol
from shmtransport.protocol.in_flight import CallInFlight
from shmtransport.protocol.values import Codec
from tests.support.arenas import Pair
from tests.support.protocols import ProtocolPair

_ROLLING_BACK = {
    "withdraw",
    "release",
    "_give_back",
    "__del__",
    "end_hold",
    "_end_hold",
    "_free",
    "collect",
    "_collect_oldest",
    "_collect_ended",
}
_FILES = {module.__file__ for module in (send_arena, receive_arena, loans, borrows, views, calls, values, allocator)}


class _InterruptAt:
    """Raises KeyboardInterrupt at the n-th place where Python would deliver a signal: when something was called.

    Not while a claim is taken back: that is as far as this goes.
    """

    def __init__(self, place: int) -> None:
        self._left = place
        self.where = ""

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event in ("call", "c_return") and code.co_filename in _FILES and code.co_name not in _ROLLING_BACK:
            self._left -= 1
            if self._left == 0:
                sys.setprofile(None)
                self.where = f"{code.co_name}, line {frame.f_lineno}"
                raise KeyboardInterrupt

    def was_reached(self) -> bool:
        return self._left <= 0


def _loan(pair: Pair) -> Any:
    return pair.send.lend((4,), torch.float32)


_VALUES: dict[str, Callable[[Pair], Any]] = {
    "loan": _loan,
    "tensor": lambda _pair: torch.ones(4),
    "strided": lambda _pair: torch.ones(8)[::2],
    "array": lambda _pair: np.ones(4),
}


def _request_interrupted_at(place: int, kind: str, core: ModuleType, alone: bool) -> tuple[str, bool, bool]:
    """Where a request was interrupted, whether it got that far, and whether nothing is held after that.

    ``alone``: the core may make it without the help of Python.
    """
    pair = Pair(4096, core=core)
    client = ClientProtocol(Codec(pair.send, pair.receive, pair.counters, 65536), pair.counters)
    if not alone:
        client._messages = None
    value = _VALUES[kind](pair)
    pending = CallInFlight("method")
    interrupt = _InterruptAt(place)
    sys.setprofile(interrupt)
    try:
        client.begin_call(pending, (value, value), {})
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    client.take_back(pending)
    del value, pending
    free = pair.is_free() and not pair.send.copies
    pair.close()
    return interrupt.where, interrupt.was_reached(), free


@pytest.mark.parametrize("alone", [False, True], ids=["with Python's help", "alone"])
@pytest.mark.parametrize("kind", _VALUES)
def test_an_interrupt_anywhere_in_a_request_leaves_nothing_held(kind: str, alone: bool, core: ModuleType) -> None:
    """A claim, a copy, a description, an encoding: each is rolled back."""
    outcomes = []
    for place in range(1, 1000):
        where, reached, free = _request_interrupted_at(place, kind, core, alone)
        if not reached:
            break
        outcomes.append((where, free))
    assert len(outcomes) > (1 if alone and core.MessageCalls is not None else 10)
    assert [where for where, free in outcomes if not free] == []


def test_a_reply_that_can_not_be_read_ends_its_own_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for a snapshot: its call gets the error, whichever thread receives the reply, and the others go on."""
    pair = ProtocolPair(snapshot=True)
    (failing, first), (fine, second) = pair.submit(), pair.submit()
    data = pair.server.encode_reply(first.call_id, torch.ones(3))

    def out_of_memory(_tensor: torch.Tensor) -> torch.Tensor:
        raise MemoryError("no memory for a copy")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", out_of_memory)
        pair.down.borrow = lambda descriptor: pair.down.sent[descriptor.sequence]  # type: ignore[method-assign]
        assert pair.client.take_reply(data) is failing
    with pytest.raises(MemoryError):
        failing.take_result()
    pair.client.take_reply(pair.server.encode_reply(second.call_id, 5))
    assert fine.take_result() == 5
    assert len(pair.client) == 0


def test_an_interrupt_while_a_reply_is_read_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt goes to whom it was sent; the call's owner does not wait for a reply that was taken."""
    pair = ProtocolPair()
    pending, call = pair.submit()
    data = pair.server.encode_reply(call.call_id, [1])

    def interrupted(*_arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for either in ("unpack", "decode_values"):
            patch.setattr(values, either, interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair.client.take_reply(data)
    with pytest.raises(Closed, match="interrupt"):
        pending.take_result()
