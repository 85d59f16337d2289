"""What the parts of a call cost in each twin of the core: ``python -m bench.harness.twins``.

Nanoseconds, best and median of many short rounds in which the twins take turns, so that what else runs on the machine
meets both alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import cast

import torch

from shmtransport.core import choose, python_twin
from shmtransport.core.codec import ARGUMENT_DEPTH, REPLY_TAG, REQUEST_TAG
from shmtransport.core.message_ring import message_ring_bytes
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.protocol.messages import Reply, Request, decode
from shmtransport.protocol.values import pack, unpack

ROUNDS = 200
REPEATS = 300
MESSAGE_BYTES = 64

Act = Callable[[], object]


def _claim_and_release(twin: ModuleType) -> Act:
    allocator = twin.NextFitAllocator(1 << 20)

    def act() -> None:
        allocator.release(allocator.claim(4096))

    return act


def _first_in_first_out(twin: ModuleType) -> Act:
    allocator = twin.NextFitAllocator(1 << 20)
    held = [allocator.claim(4096) for _ in range(16)]

    def act() -> None:
        held.append(allocator.claim(4096))
        allocator.release(held.pop(0))

    return act


def _write_and_read(twin: ModuleType) -> Act:
    one, other = (memoryview(bytearray(message_ring_bytes(65536))) for _ in range(2))
    writer, reader = twin.MessageRing(one, other), twin.MessageRing(other, one)
    message = bytes(MESSAGE_BYTES)

    def act() -> None:
        writer.write(message)
        reader.read()

    return act


def _look(twin: ModuleType) -> Act:
    one, other = (memoryview(bytearray(message_ring_bytes(65536))) for _ in range(2))
    reader = twin.MessageRing(one, other)
    return lambda: reader.wait_readable(0.0)


_DESCRIPTORS = [TensorDescriptor(4096, (16,), "float32", 5, 123456)]
_TENSOR = torch.ones(16)


def _pack(value: object, depth: int) -> object:
    return pack(value, lambda _tensor: 0, depth)


def _encode(twin: ModuleType) -> Act:
    return lambda: twin.encode_request(1234, "double", (_TENSOR,), {}, _pack, _DESCRIPTORS, None)


def _decode(twin: ModuleType) -> Act:
    data, *_ = python_twin.encode_request(1234, "double", (_TENSOR,), {}, _pack, _DESCRIPTORS, None)
    tensors = (_TENSOR,)

    def compiled() -> object:
        _, _, _, start = twin.decode_call(data, TensorDescriptor)
        return twin.decode_values(REQUEST_TAG, data, start, tensors, None)

    def specified() -> object:
        message = cast("Request", decode(data))
        arguments = [unpack(argument, tensors, ARGUMENT_DEPTH) for argument in message.arguments]
        return arguments, {name: unpack(one, tensors, ARGUMENT_DEPTH) for name, one in message.keywords.items()}

    return specified if twin is python_twin else compiled


_VALUES = [[1, -500, 2.5, "text", b"bytes"], {"layer": 3, "name": "é"}, (None, True, [1, 2, 3])]


def _encode_values(twin: ModuleType) -> Act:
    return lambda: twin.encode_reply(1234, _VALUES, _pack, [], None)


def _decode_values(twin: ModuleType) -> Act:
    data, *_ = python_twin.encode_reply(1234, _VALUES, _pack, [], None)

    def compiled() -> object:
        _, _, _, start = twin.decode_call(data, TensorDescriptor)
        return twin.decode_values(REPLY_TAG, data, start, (), None)

    def specified() -> object:
        return unpack(cast("Reply", decode(data)).result, ())

    return specified if twin is python_twin else compiled


PARTS: dict[str, Callable[[ModuleType], Act]] = {
    "claim + release": _claim_and_release,
    "the same, 16 held, first in first out": _first_in_first_out,
    f"write + read, {MESSAGE_BYTES} B": _write_and_read,
    "one look at an empty ring": _look,
    "encode a request of one tensor": _encode,
    "decode that request": _decode,
    "encode a reply of 12 plain values": _encode_values,
    "decode that reply": _decode_values,
}


def _nanoseconds(act: Act) -> float:
    started = time.perf_counter_ns()
    for _ in range(REPEATS):
        act()
    return (time.perf_counter_ns() - started) / REPEATS


def main() -> None:
    """Measure each part in both twins, and print a table."""
    twins = (python_twin, choose("native")[0])
    empty = statistics.median(_nanoseconds(lambda: None) for _ in range(ROUNDS))
    print(f"{'ns, best / median':40}{'Python':>16}{'C':>16}{'ratio':>8}    (an empty call of {empty:.0f} ns taken off)")
    for part, make in PARTS.items():
        acts = [make(twin) for twin in twins]
        rounds = [[_nanoseconds(act) - empty for act in acts] for _ in range(ROUNDS)]
        columns = list(zip(*rounds, strict=True))
        best, middle = ([pick(column) for column in columns] for pick in (min, statistics.median))
        cells = "".join(f"{low:8.0f} /{half:6.0f}" for low, half in zip(best, middle, strict=True))
        print(f"{part:40}{cells}{middle[0] / middle[1]:8.1f}")


if __name__ == "__main__":
    main()
