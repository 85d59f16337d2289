"""A client process that does nothing but calls, and checks what comes back: ``innocent.py ADDRESS CHANNEL``.

Prints "ready", then a line of JSON many times a second: the calls so far, how many results were wrong, the error that
ended it all or null, and the longest call in seconds since the line before.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch

from shmtransport import Client, TransportError

_REPORT_S = 0.05
_PAUSE_S = 0.002
_DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)


def right(client: Client, turn: int) -> bool:
    """Make one call; whether its result is what it must be."""
    size, kind = 1 + turn * 37 % 3000, turn % 3
    x = torch.full((size,), turn % 100, dtype=_DTYPES[turn % len(_DTYPES)])
    if kind == 0:
        return torch.equal(client.call("double", x), x * 2)
    if kind == 1:
        return torch.equal(client.call("fill", size, float(turn)), torch.full((size,), float(turn)))
    sent: dict[str, Any] = {"plain": [turn, "text", None], "tensor": x, "array": np.arange(size)}
    received = client.call("echo", sent)
    return (
        received["plain"] == sent["plain"]
        and torch.equal(received["tensor"], x)
        and np.array_equal(received["array"], sent["array"])
    )


def report(calls: int, wrong: int, error: str | None, worst_s: float) -> None:
    print(json.dumps({"calls": calls, "wrong": wrong, "error": error, "worst_s": worst_s}), flush=True)


calls = wrong = 0
worst_s = 0.0
client = Client(sys.argv[1], channel=sys.argv[2], arena_bytes=256 * 1024, timeout_s=30.0)  # type: ignore[arg-type]
print("ready", flush=True)
due = time.monotonic()
while True:
    started = time.monotonic()
    try:
        wrong += not right(client, calls)
    except TransportError as failure:
        report(calls, wrong, f"{type(failure).__name__}: {failure}", worst_s)
        break
    calls += 1
    now = time.monotonic()
    worst_s = max(worst_s, now - started)
    if now >= due:
        report(calls, wrong, None, worst_s)
        due, worst_s = now + _REPORT_S, 0.0
    time.sleep(_PAUSE_S)
client.close()
time.sleep(600)
