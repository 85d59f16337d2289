"""Direct answers where memory is short."""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import pytest
import torch

from shmtransport.protocol.values import Codec
from tests.support.arenas import Pair


def test_no_memory_for_a_reply_fails_its_call_alone(core: ModuleType) -> None:
    """Wherever memory is short, what a handler has returned is not held without a reply that tells of it."""
    testing = pytest.importorskip("_testcapi", reason="this Python has no way to be short of memory")
    if core.DirectAnswers is None:
        pytest.skip("the Python twin makes no direct answers")
    caller: ContextVar[Any] = ContextVar("caller")
    caller.set(None)
    kept = torch.arange(4)
    outcomes: Counter[str] = Counter()
    for place in range(60):
        up, down = Pair(1 << 16, core=core), Pair(1 << 16, core=core)
        answers = core.DirectAnswers(
            None,
            {"m": lambda *_: [kept]},
            down.send.loans,
            up.receive.borrows,
            down.counters,
            caller.set,
            caller.reset,
            None,
            1 << 16,
        )
        messages = [Codec(up.send, up.receive, up.counters, 1 << 16).encode_request(0, "m", (1,), {}, 0.0)]
        testing.set_nomemory(place, place + 1)
        try:
            answered = answers.answer(messages)
        except MemoryError as error:
            answered = error
        finally:
            testing.remove_mem_hooks()
        outcomes[type(answered).__name__] += 1
        assert isinstance(answered, bytes) or down.send.held_by_peer == 0, place
        up.close()
        down.close()
    assert outcomes["bytes"] > 10
    assert outcomes["tuple"] > 3
