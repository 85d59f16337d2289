"""Hostile bytes from a seeded generator: valid ones damaged in every way MessagePack allows, and nonsense in shape.

Everything is drawn from the ``random.Random`` that is passed in, so that a seed gives the same inputs again. No
message is longer than what a channel lets through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import msgspec

from shmtransport.core.layout import HEADER
from shmtransport.memory.dtypes import TABLE
from shmtransport.protocol.messages import DEFAULT_MAX_MESSAGE_BYTES, PREAMBLE

BOUNDARIES = tuple(
    sorted(
        {0, 1, -1, -32, -33, -(2**7), -(2**15), -(2**31), -(2**63)}
        | {2**bits + step for bits in (5, 7, 8, 15, 16, 31, 32, 53, 60, 61, 62, 63) for step in (-1, 0, 1)}
        | {2**64 - 1, 63, 64, 65, 1023, 1024, 1025, 4095, 4096, 4097}
    )
)

_encode = msgspec.msgpack.encode
_DTYPES = tuple(row.name for row in TABLE)
_ITEM_BYTES = {row.name: row.itemsize for row in TABLE}

# --- values that take another's place ---------------------------------------------------------------------------------

_INTEGERS = (
    *map(_encode, BOUNDARIES),
    b"\xd3" + b"\xff" * 8,  # -1 and 0 in nine bytes each: not the shortest form
    b"\xcf" + b"\0" * 8,
)
_OTHERS = (
    b"\xc0",
    b"\xc1",  # never used by MessagePack
    b"\xc2",
    b"\xc3",
    b"\xca\x7f\xc0\0\0",
    b"\xcb\x7f\xf0\0\0\0\0\0\0",
    b"\xcb\x3f\xf8\0\0\0\0\0\0",
    b"\xa0",
    b"\xa1\xff",  # no UTF-8
    b"\xa3\xed\xa0\x80",  # half of a surrogate pair
    b"\xa1\0",
    _encode("zmq"),
    _encode("doorbell"),
    _encode("x" * 257),
    _encode("x" * 4097),
    b"\xc4\0",
    b"\xc4\x02ab",
    b"\x90",
    b"\x80",
    b"\x91\x90",
    b"\x81\x90\x90",  # a list, a dict, nothing and a number as a key
    b"\x81\x80\x80",
    b"\x81\xc0\xc0",
    b"\x81\xcb\x3f\xf8\0\0\0\0\0\0\xc0",
    b"\x82\xa1k\x01\xa1k\x02",
)
_EXTENSIONS = (
    b"\xd5\x01\0\0",  # code 1: tensor, 2: array, 3: the mark of a tuple
    b"\xd5\x01\xff\xff",
    b"\xd5\x02\0\0",
    b"\xd5\x02\x00\x04",
    b"\xd4\x01\0",
    b"\xd7\x01" + b"\0" * 8,
    b"\xc7\0\x01",
    b"\xc7\0\x03",
    b"\x91\xc7\0\x03",
    b"\x92\x01\xc7\0\x03",
    b"\xc7\x02\x03ab",
    b"\xd5\x04\0\0",
    b"\xd5\x80\0\0",
    b"\xd6\xff\0\0\0\0",  # code -1: timestamps, in range and beyond
    b"\xd7\xff" + b"\xff" * 8,
    b"\xc7\x0c\xff\0\0\0\0" + b"\x7f" * 8,
    b"\xc7\x0c\xff\0\0\0\0" + b"\x80" + b"\0" * 7,
    b"\xc7\x0c\xff" + b"\xff" * 12,
)
VALUES = _INTEGERS + _OTHERS + _EXTENSIONS

_LYING_HEADS = tuple(
    bytes((head,)) + count.to_bytes(size, "big")
    for heads, size in (
        ((0xC4, 0xD9, 0xC7), 1),
        ((0xC5, 0xDA, 0xDC, 0xDE, 0xC8), 2),
        ((0xC6, 0xDB, 0xDD, 0xDF, 0xC9), 4),
    )
    for head in heads
    for count in (1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
)
_DEPTHS = (1, 2, 29, 30, 31, 32, 33, 34, 35, 200, 900, 1000, 1100, 5000)
_LENGTHS = (2, 15, 16, 17, 255, 256, 1023, 1024, 1025, 5000)
_SHELLS = (b"\x91", b"\x91", b"\x92\xc7\0\x03", b"\x81\xa1k", b"\x81\x01", b"\x81", b"\xdd\0\0\0\x01")
_TELLING_BYTES = bytes(
    (0x00, 0x01, 0x7F, 0x80, 0x81, 0x8F, 0x90, 0x91, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE1), 0xFE, 0xFF)
)

# --- damage -----------------------------------------------------------------------------------------------------------

_HEAD_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_TOKEN_BYTES = {0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}
_TOKEN_BYTES |= {0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18, 0xDC: 3, 0xDD: 5, 0xDE: 3, 0xDF: 5}
_MOST_TOKENS = 48


def tokens(data: bytes, start: int = 0) -> list[tuple[int, int]]:
    """Start and end of the first values in ``data``; for a list or dict, of its head alone."""
    found = []
    at, end = start, len(data)
    while at < end and len(found) < _MOST_TOKENS:
        first = data[at]
        if first in _HEAD_BYTES:
            size = _HEAD_BYTES[first]
            after = at + 1 + size + int.from_bytes(data[at + 1 : at + 1 + size], "big") + (0xC7 <= first <= 0xC9)
        elif 0xA0 <= first < 0xC0:
            after = at + 1 + (first & 31)
        else:
            after = at + _TOKEN_BYTES.get(first, 1)
        found.append((at, min(after, end)))
        at = after
    return found


def _some_token(random: Random, data: bytes) -> tuple[int, int]:
    start = len(PREAMBLE) if data.startswith(PREAMBLE) else 0
    found = tokens(data, start)
    return random.choice(found) if found else (len(data), len(data))


def _flip_bits(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _change_bytes(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(random.choice((1, 1, 2, 3))):
        changed[random.randrange(len(changed))] = random.choice(_TELLING_BYTES)
    return bytes(changed)


def _change_type(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    begin, _ = _some_token(random, data)
    return data[:begin] + bytes((random.choice(_TELLING_BYTES),)) + data[begin + 1 :]


def _truncate(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _extend(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    return data + random.choice((random.randbytes(random.randrange(1, 20)), b"\0", b"\xc0", data))


def _cut_out(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    begin = random.randrange(len(data) + 1)
    return data[:begin] + data[begin + random.randrange(1, 9) :]


def _repeat(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    begin = random.randrange(len(data) + 1)
    end = begin + random.randrange(1, 33)
    return data[:end] + data[begin:end] * random.choice((1, 1, 2, 100)) + data[end:]


def _splice(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = random.choice(others)
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]


def _exchange_token(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    begin, end = _some_token(random, data)
    other = random.choice(others)
    other_begin, other_end = _some_token(random, other)
    return data[:begin] + other[other_begin:other_end] + data[end:]


def _replace_token(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    begin, end = _some_token(random, data)
    return data[:begin] + random.choice(VALUES) + data[end:]


def _replace_integer(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    start = len(PREAMBLE) if data.startswith(PREAMBLE) else 0
    whole = [token for token in tokens(data, start) if data[token[0]] < 0x80 or 0xCC <= data[token[0]] <= 0xD3]
    if not whole:
        return data
    begin, end = random.choice(whole)
    return data[:begin] + random.choice(_INTEGERS) + data[end:]


def _insert_token(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    begin, _ = _some_token(random, data)
    return data[:begin] + random.choice(VALUES) + data[begin:]


def _remove_token(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    begin, end = _some_token(random, data)
    return data[:begin] + data[end:]


def _lie_about_length(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    begin, end = _some_token(random, data)
    return data[:begin] + random.choice(_LYING_HEADS) + data[random.choice((begin, end)) :]


def _nest(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    begin, end = _some_token(random, data)
    return data[:begin] + nested(random, random.choice(_DEPTHS), data[begin:end]) + data[end:]


def _lengthen(random: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    begin, end = _some_token(random, data)
    return data[:begin] + array_of([data[begin:end]] * random.choice(_LENGTHS)) + data[end:]


_Damage = Callable[[Random, bytes, Sequence[bytes]], bytes]
_OFTEN: tuple[_Damage, ...] = (
    _flip_bits,
    _change_bytes,
    _change_type,
    _truncate,
    _extend,
    _cut_out,
    _splice,
    _exchange_token,
    _replace_token,
    _replace_integer,
    _insert_token,
    _remove_token,
    _lie_about_length,
)
_SELDOM: tuple[_Damage, ...] = (_repeat, _nest, _lengthen)
_DAMAGES = _OFTEN * 4 + _SELDOM


def mutate(random: Random, valid: Sequence[bytes]) -> bytes:
    """One of the valid encodings with one to five damages."""
    data = random.choice(valid)
    for _ in range(random.choice((1, 1, 1, 1, 2, 2, 3, 5))):
        data = random.choice(_DAMAGES)(random, data, valid)
        if len(data) > DEFAULT_MAX_MESSAGE_BYTES:
            return data[:DEFAULT_MAX_MESSAGE_BYTES]
    return data


def damaged_header(random: Random, header: bytes) -> bytes:
    """A segment's header with other numbers in one or more of its fields, mostly in those that give sizes."""
    fields = list(HEADER.unpack(header))
    for _ in range(random.choice((1, 1, 2, 4))):
        index = random.choice((5, 7, 9)) if random.random() < 0.7 else random.randrange(1, len(fields))
        fields[index] = random.choice(BOUNDARIES) % (2**32 if index < 3 else 2**64)
    return HEADER.pack(*fields)


# --- nonsense in shape ------------------------------------------------------------------------------------------------


def array_of(items: Sequence[bytes]) -> bytes:
    """A list of values that are encoded already."""
    count = len(items)
    head = bytes((0x90 | count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
    return head + b"".join(items)


def map_of(items: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A dict of keys and values that are encoded already."""
    count = len(items)
    head = bytes((0x80 | count,)) if count < 16 else b"\xde" + count.to_bytes(2, "big")
    return head + b"".join(key + value for key, value in items)


def nested(random: Random, depth: int, core: bytes) -> bytes:
    """A value nested in that many lists, tuples or dicts of one item each."""
    return random.choice(_SHELLS) * depth + core


def integer(random: Random) -> int:
    """A small number, one at the edge of something, or any at all."""
    kind = random.random()
    if kind < 0.5:
        return random.randrange(20)
    if kind < 0.85:
        return random.choice(BOUNDARIES)
    return random.randrange(-(2**63), 2**64)


def count(random: Random) -> int:
    """A number that a message's count may be."""
    return min(max(integer(random), 0), 2**63 - 1)


def value(random: Random, tensors: int = 0, depth: int = 0) -> bytes:
    """An encoded value; mostly one that may be sent in a message with that many tensors."""
    kind = random.random()
    if depth < 6 and kind < 0.3:
        items = [value(random, tensors, depth + 1) for _ in range(random.randrange(5))]
        return array_of([b"\xc7\0\x03", *items] if random.random() < 0.3 else items)
    if depth < 6 and kind < 0.45:
        pairs = [(_key(random), value(random, tensors, depth + 1)) for _ in range(random.randrange(4))]
        return map_of(pairs)
    if kind < 0.6 and tensors:
        return bytes((0xD5, random.choice((1, 1, 2)))) + random.randrange(tensors).to_bytes(2, "little")
    if kind < 0.95:
        return _encode(random.choice((None, True, False, integer(random), random.random(), "text", "", b"bytes")))
    if kind < 0.96:
        return nested(random, random.choice(_DEPTHS), b"\xc0")
    return random.choice(VALUES)


def _key(random: Random) -> bytes:
    kind = random.random()
    if kind < 0.6:
        return _encode(random.choice("abcdef"))
    return _encode(integer(random)) if kind < 0.95 else random.choice(VALUES)


def shape(random: Random, elements: int) -> list[int]:
    """A tensor's sizes: mostly such that there are about ``elements`` of them, or one less or more, or none."""
    kind = random.random()
    if kind < 0.15:
        return [count(random) for _ in range(random.choice((1, 2, 3, 15, 16, 17, 40)))]
    if kind < 0.3:
        sizes = [count(random) for _ in range(random.choice((1, 2, 3, 16)))]
        sizes[random.randrange(len(sizes))] = 0
        return sizes
    if kind < 0.5:
        return [max(elements + random.choice((-1, 0, 0, 0, 1)), 0)]
    sizes = []
    for _ in range(random.choice((0, 1, 2, 3, 15, 16, 17))):
        size = random.choice((1, 1, 2, 3, max(elements, 1)))
        sizes.append(size)
        elements //= size
    return sizes


def descriptor(random: Random, data_bytes: int, slots: int, sequences: int = 0) -> bytes:
    """A forged descriptor, mostly just inside or just outside of what a segment of these sizes allows.

    ``sequences``: that many, from 1, are known to the receiver; else any will do.
    """
    dtype = random.choice(_DTYPES)
    item = _ITEM_BYTES[dtype]
    offset = random.randrange(data_bytes + 1) // item * item
    if random.random() < 0.3:
        offset = max(random.choice((0, 0, 1, item, data_bytes - item, data_bytes, count(random))), 0)
    room = max(data_bytes - offset, 0) // item
    sizes = shape(random, random.choice((1, 4, room, room, room + 1)))
    slot = random.randrange(slots) if random.random() < 0.9 else random.choice((slots - 1, slots, count(random)))
    sequence = random.randrange(1, sequences + 1) if sequences and random.random() < 0.9 else count(random)
    if 0 in sizes and random.random() < 0.8:
        sequence = 0
    elif sequence == 0 and random.random() < 0.8:
        sequence = 1
    fields = [_encode(field) for field in (offset, sizes, dtype, slot, sequence)]
    if random.random() < 0.05:
        fields[random.randrange(5)] = random.choice(random.choice((VALUES, _INTEGERS)))
    elif random.random() < 0.02:
        fields = random.choice((fields[:-1], [*fields, b"\0"]))
    return array_of(fields)


_FIELDS: dict[int, tuple[str, ...]] = {
    0: ("count", "count", "count", "channel"),
    1: ("text",),
    2: ("count",),
    3: ("name", "name"),
    4: ("name", "name"),
    5: ("text",),
    6: ("count", "name", "arguments", "keywords", "tensors"),
    7: ("count", "value", "tensors"),
    8: ("count", "name", "name", "text", "text"),
    9: ("count", "name", "arguments", "keywords", "tensors"),
    10: ("count", "name", "arguments", "keywords", "tensors", "window"),
    11: ("count", "value", "tensors"),
    12: ("count", "window"),
    13: ("count",),
}
_TEXTS = tuple(
    _encode(text) for text in ("", "handler", "ArenaFull", "é😀", "x" * 256, "x" * 257, "x" * 4096, "x" * 4097)
)


def message(random: Random, tags: Sequence[int] = tuple(_FIELDS), sequences: int = 4) -> bytes:
    """A message with about the right fields; its descriptors name the tensors of sequences 1 to ``sequences``."""
    tag = random.choice(tags)
    tensors = random.choice((0, 0, 1, 2, 3))
    fields = [_encode(tag)] + [_field(random, kind, tensors, sequences) for kind in _FIELDS[tag]]
    kind = random.random()
    if kind < 0.05:
        fields[random.randrange(len(fields))] = random.choice(VALUES)
    elif kind < 0.08:
        fields.insert(random.randrange(len(fields) + 1), random.choice(VALUES))
    elif kind < 0.11:
        del fields[random.randrange(len(fields))]
    return PREAMBLE + array_of(fields)


def _field(random: Random, kind: str, tensors: int, sequences: int) -> bytes:
    if kind == "count":
        return _encode(random.randrange(4) if random.random() < 0.8 else count(random))
    if kind == "window":
        return _encode(random.choice((1, 2, 8, 1024)) if random.random() < 0.8 else count(random))
    if kind == "channel":
        return _encode(random.choice(("zmq", "doorbell")))
    if kind in ("text", "name"):
        return random.choice(_TEXTS[:5] if random.random() < 0.8 else _TEXTS)
    if kind == "arguments":
        return array_of([value(random, tensors) for _ in range(random.randrange(4))])
    if kind == "keywords":
        return map_of([(_encode(random.choice("abc")), value(random, tensors)) for _ in range(random.randrange(3))])
    if kind == "value":
        return value(random, tensors)
    descriptors = [descriptor(random, 4096, 16, sequences) for _ in range(tensors)]
    if random.random() < 0.01:
        descriptors *= random.choice((500, 1024, 1025))
    return array_of(descriptors)
