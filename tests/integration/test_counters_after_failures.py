"""Counters never go backwards or below zero, whatever is refused, withdrawn or fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

from shmtransport import Client, Statistics, TransportError
from shmtransport.message import ChannelKind

from .helpers import KIB, DeliberateError, Serve

_TOTALS = [field.name for field in fields(Statistics) if field.name != "latency_histogram"] + ["copies_avoided"]


def _fail() -> None:
    raise DeliberateError


_REFUSED: dict[str, Callable[[Client], Any]] = {
    "too many tensors": lambda client: client.call("take", [torch.ones(4)] * 1025),
    "a later tensor too large": lambda client: client.call("take", torch.ones(4), torch.ones(64 * KIB)),
    "no room for a later tensor": lambda client: client.call("take", *[torch.ones(3 * KIB)] * 8),
    "values too large": lambda client: client.call("take", torch.ones(4), "x" * 100_000),
    "a value of another type": lambda client: client.call("take", torch.ones(4), object()),
    "a loan with a value of another type": lambda client: client.call(
        "take", client.empty((4,), torch.float32), object()
    ),
    "an integer too large": lambda client: client.call("take", torch.ones(4), 2**64),
    "a bad shape": lambda client: client.empty((3.0,), torch.float32),  # type: ignore[arg-type]
    "a method without a name": lambda client: client.call(3, torch.ones(4)),  # type: ignore[arg-type]
    "no such method": lambda client: client.call("nothing", torch.ones(4)),
    "a handler that fails": lambda client: client.call("fail"),
    "a result too large": lambda client: client.call("give", [torch.ones(4), torch.ones(64 * KIB)]),
    "a result of another type": lambda client: client.call("odd"),
    "a reply that comes too late": lambda client: client.submit("take", torch.ones(4)).result(0.0),
}


def _all_at_least(now: Statistics, before: Statistics) -> bool:
    return all(getattr(now, name) >= getattr(before, name) >= 0 for name in _TOTALS)


@pytest.mark.parametrize("what", _REFUSED)
def test_counters_only_grow(serve: Serve, address: str, channel: ChannelKind, what: str) -> None:
    """On both sides, in every total: each is at least what it was, and a refused message counts nothing at all."""
    server = serve(
        take=lambda *_: None,
        fail=_fail,
        give=lambda tensors: [torch.ones(4), torch.ones(64 * KIB)],
        odd=lambda: [torch.ones(4), object()],
    )
    with Client(address, channel=channel, arena_bytes=64 * KIB, timeout_s=0.5) as client:
        client.call("take", torch.ones(4), client.empty((4,), torch.float32).fill_(1.0))
        for _ in range(3):
            mine, theirs = client.statistics(), server.statistics()
            with contextlib.suppress(TransportError):
                _REFUSED[what](client)
            client.call("take")
            now = client.statistics()
            assert _all_at_least(now, mine)
            assert _all_at_least(server.statistics(), theirs)
            assert now.tensors_sent - mine.tensors_sent == (now.tensors_copied - mine.tensors_copied)
            assert server.statistics().tensors_copied == server.statistics().tensors_sent == 0
            assert now.failures <= now.calls
            assert server.statistics().failures <= server.statistics().calls
