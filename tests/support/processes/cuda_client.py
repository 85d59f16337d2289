"""A client with a GPU, on the stand-in for CUDA's driver: ``cuda_client.py ADDRESS LIBRARY SETTINGS WHAT``.

LIBRARY is the stand-in's path, SETTINGS are its settings in JSON. Prints "ready" once it is connected, does WHAT, which
is one of the functions below, and prints what that returns in JSON, or its error.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch

from shmtransport import Client, RemoteError, TransportError
from shmtransport.cuda.driver import ask
from shmtransport.endpoints.device_sharing import SHARE
from shmtransport.memory.descriptor import DEVICE_OFFSET, TensorDescriptor
from shmtransport.memory.dtypes import BY_TORCH
from shmtransport.units import KIB, MIB

address, library, settings, what = sys.argv[1:5]
os.environ.update({f"FAKE_CUDA_{name}": str(value) for name, value in json.loads(settings).items()})
stand_in = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
options: dict[str, Any] = {"arena_bytes": 4 * MIB, "timeout_s": 10.0, "channel": "doorbell"}
if what in ("one_block", "without_room"):
    options["arena_bytes"] = 64 * KIB
if what == "stalled":
    options["timeout_s"] = 0.3
client = Client(address, device="cuda:0", **options)


def made(count: int, dtype: torch.dtype, value: int) -> Any:
    """A tensor in the arena on the GPU, all of whose bytes are set, later."""
    tensor = client.empty((count,), dtype, device="cuda:0")
    start, _ = tensor.__cuda_array_interface__["data"]
    with client._gpu.current():
        ask("cuMemsetD8Async", start, value, tensor.nbytes, client.cuda_stream.handle)
    return tensor


def content(tensor: Any) -> list[int]:
    """The different bytes of a tensor, looked at in the stand-in's memory."""
    if isinstance(tensor, torch.Tensor):
        return sorted({*tensor.view(torch.uint8).tolist()})
    start, _ = tensor.__cuda_array_interface__["data"]
    seen = np.frombuffer((ctypes.c_uint8 * tensor.nbytes).from_address(start), np.uint8)
    return sorted({*seen.tolist()})


def arena() -> Any:
    return client._exchange.live().memory.copies.arena


def path() -> list[Any]:
    """How tensors cross, and that they do."""
    x = client.empty((1000,), torch.uint8, device="cuda:0")
    start, _ = x.__cuda_array_interface__["data"]
    with client._gpu.current():
        ask("cuMemsetD8Async", start, 5, x.nbytes, client.cuda_stream.handle)
    result = client.call("made", 100, 9)
    return [
        client.device_path,
        client.call("kind", x),
        content(client.call("echo", x)),
        [type(result).__name__, content(result)],
    ]


def no_gpu() -> list[Any]:
    """The same of a server without a GPU."""
    x = made(1000, torch.uint8, 5)
    return [client.device_path, client.call("kind", x), content(client.call("echo", x))]


def after_a_failure() -> Any:
    """Send a tensor on the GPU to a server whose GPU has failed."""
    x = made(1000, torch.uint8, 1)
    with contextlib.suppress(RemoteError):
        client.call("there_and_back", torch.ones(3))
    return client.call("kind", x)


def released_late() -> None:
    """Release a result after its client is closed, and a garbage collection."""
    global client
    result = client.call("made", 1000, 4)
    client.close()
    del client
    gc.collect()
    print("holding", flush=True)
    time.sleep(0.3)
    del result
    print("released", flush=True)
    time.sleep(5)
    sys.exit()


def keeping() -> list[str]:
    """Keep a result of each of six clients that are closed then; how tensors crossed."""
    results, paths = [client.call("made", 1000, 4)], [client.device_path]
    for _ in range(5):
        client.close()
        client.reconnect()
        paths.append(client.device_path)
        results.append(client.call("made", 1000, 4))
    return paths


def forking() -> list[Any]:
    """Let a result die in a forked child; the child's exit code, and the result's content after another call."""
    result = client.call("made", 100_000, 4)
    child = os.fork()
    if child == 0:
        del result
        os._exit(0)
    _, status = os.waitpid(child, 0)
    time.sleep(0.1)
    client.call("made", 100_000, 5)
    return [os.waitstatus_to_exitcode(status), content(result)]


def many() -> list[int]:
    """Hold more results than there are slots; how many are on the GPU, and how many are not."""
    results = [client.call("made", 10, 4) for _ in range(1030)]
    kinds = [type(result).__name__ for result in results]
    return [kinds.count("CudaTensor"), kinds.count("Tensor")]


def echoed() -> list[Any]:
    """Of every size and dtype: what comes back of what is sent, and whether it has the same shape and dtype."""
    found = []
    for count in (1, 1000, 300_000):
        for dtype in (torch.float32, torch.bfloat16, torch.bool):
            x = made(count, dtype, 1)
            back = client.call("echo", x)
            found.append([content(back), back.dtype == dtype and tuple(back.shape) == (count,)])
            both = client.call("echo", {"gpu": [x], "cpu": torch.ones(3)})
            found.append([content(both["gpu"][0]), bool(both["cpu"].sum() == 3)])
    return found


def in_place() -> list[Any]:
    """What the server sees of a loan, and what it makes in the arena, without a copy on either side."""
    x = made(1000, torch.uint8, 3)
    found = [client.call("kind", x), content(client.call("made", 5000, 9))]
    calls = [client.call("count", f"calls:{name}") for name in ("cuMemcpyDtoDAsync_v2", "cuMemcpyDtoDAsync")]
    return [*found, sum(calls), client.call("facts")["pinned"]]


def one_block() -> list[list[int]]:
    """Let the server copy tensors later that have room only one after the other; what it has copied."""
    for value in (1, 2, 3):
        while (x := arena().lend((40_000,), BY_TORCH[torch.uint8])) is None:
            arena().loans.collect()
            time.sleep(0.001)
        start, _ = x.__cuda_array_interface__["data"]
        with client._gpu.current():
            ask("cuMemsetD8Async", start, value, x.nbytes, client.cuda_stream.handle)
        client.call("copy_later", x)
        del x
    return [content(client.call("kept_again", index)) for index in range(3)]


def without_room() -> list[Any]:
    """A tensor that has no room in the arena on the GPU."""
    x = made(40_000, torch.uint8, 1)
    y = made(40_000, torch.uint8, 2)
    return [client.call("kind", x), client.call("kind", y), content(client.call("echo", y))]


def nothing_held() -> list[int]:
    """What is held once all is gone."""
    results = [client.call("echo", made(1000, torch.uint8, value)) for value in range(20)]
    before = arena().borrowed
    results.clear()
    gc.collect()
    deadline = time.monotonic() + 5
    while (arena().loans.blocks or arena().borrowed) and time.monotonic() < deadline:
        arena().loans.collect()
        time.sleep(0.001)
    return [before, arena().loans.blocks, arena().borrowed]


def outliving() -> list[int]:
    """A result whose client is closed and gone."""
    result = client.call("made", 100_000, 4)
    client.close()
    gc.collect()
    return content(result)


def beyond() -> Any:
    """Name a range beyond this side's memory."""
    arena().loans._describe = lambda _offset, shape, dtype, slot, sequence: TensorDescriptor(
        DEVICE_OFFSET + 4 * MIB, shape, dtype, slot, sequence
    )
    return client.call("kind", made(1000, torch.uint8, 1))


def again() -> Any:
    """Share memory a second time, with a secret that nothing came with."""
    return client.call(SHARE, b"?" * 16, 0)


def stalled() -> Any:
    return client.call("kind", made(1000, torch.uint8, 1))


def wait() -> None:
    """Hold a result until this process is killed."""
    result = client.call("made", 1000, 4)
    client.call("keep_borrowed", made(1000, torch.uint8, 1))
    print("holding", flush=True)
    time.sleep(60)
    del result


def died() -> list[Any]:
    """Call a server that was killed; then look at a result of it."""
    result = client.call("made", 1000, 4)
    print("holding", flush=True)
    try:
        while True:
            client.call("kind", result)
    except TransportError as error:
        return [type(error).__name__, content(result)]


print("ready", flush=True)
try:
    print(json.dumps(globals()[what]()), flush=True)
except TransportError as error:
    print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
client.close()
