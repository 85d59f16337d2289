"""What a call carries, how the server answers, and how the client checks the answer.

All tensors, or arrays, of the round-trip benchmarks are one-dimensional int64. There are two kinds of calls:

* *stamped*, the measured kind: the sender writes one number into the first, the middle and the last word, and the
  receiver reads these three. The server answers with the number plus one in the same places. Neither side touches
  the rest, so a transport that doesn't copy isn't charged for memory traffic that only the benchmark would cause;
* *full*, before and after the measured ones: every word is random, the server adds one to each, and the client
  compares every word of the answer. The first word is negative, which is how the server recognises a full request.

Every contender uses these functions, so that all do the same work.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

WORD_BYTES = 8
SMALLEST_BYTES = 8 * WORD_BYTES
_WRONG = -(1 << 62)  # the server's answer to a damaged request


Array: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
Words: TypeAlias = "torch.Tensor | Array"
"""What is carried; arrays by the contenders that send them."""


class WrongAnswer(Exception):
    """A contender delivered something other than what was sent."""


def view(memory: Any) -> torch.Tensor:
    """A tensor over these bytes, without a copy."""
    return torch.from_numpy(np.frombuffer(memory, np.int64))


def _array(words: Words) -> Array:
    return words.numpy() if isinstance(words, torch.Tensor) else words


def words(nbytes: int) -> int:
    """How many words a tensor of ``nbytes`` bytes has.

    Raises:
        ValueError: The size can't be stamped.
    """
    if nbytes < SMALLEST_BYTES or nbytes % WORD_BYTES:
        raise ValueError(f"a size must be a multiple of {WORD_BYTES} and at least {SMALLEST_BYTES} bytes, not {nbytes}")
    return nbytes // WORD_BYTES


def stamp(tensor: Words, value: int) -> None:
    """Write ``value`` (not negative) into the first, middle and last word."""
    _stamp(_array(tensor), value)


def stamped_with(tensor: Words) -> int:
    """The value of a stamp; ``_WRONG`` if the three words differ."""
    return _stamp_of(_array(tensor))


def _stamp(array: Array, value: int) -> None:
    array[0] = array[len(array) // 2] = array[-1] = value


def _stamp_of(array: Array) -> int:
    first = array.item(0)
    return first if array.item(len(array) // 2) == first == array.item(-1) else _WRONG


def respond(request: Words, reply: Words) -> None:
    """In the server: write the answer to ``request`` into ``reply``, which has the same size.

    This is part of each contender's call, so it does as little as it can.
    """
    sent, answer = _array(request), _array(reply)
    if sent.item(0) < 0:
        np.add(sent, 1, out=answer)
    else:
        _stamp(answer, _stamp_of(sent) + 1)


def check_stamp(reply: Words, value: int, nbytes: int) -> None:
    """Check that ``reply`` answers a request that was stamped with ``value``.

    Args:
        reply: What came back.
        value: The request's stamp.
        nbytes: The request's size.

    Raises:
        WrongAnswer: It has another size or another stamp.
    """
    if reply.nbytes != nbytes:
        raise WrongAnswer(f"sent {nbytes} bytes, but {reply.nbytes} came back")
    found = stamped_with(reply)
    if found != value + 1:
        raise WrongAnswer(f"the answer to stamp {value} has stamp {found} instead of {value + 1}")


def fill(request: Words, seed: int) -> None:
    """Write a full request: random words, the first of them negative."""
    array = _array(request)
    generator = np.random.default_rng(seed)
    array[:] = generator.integers(-(1 << 62), 1 << 62, size=len(array), dtype=np.int64)
    array[0] = -1 - abs(int(array[0]))


def check_full(reply: Words, seed: int, nbytes: int) -> None:
    """Check that every word of ``reply`` answers the full request with this seed.

    Args:
        reply: What came back.
        seed: The seed that the request was filled with.
        nbytes: The request's size.

    Raises:
        WrongAnswer: Some word doesn't.
    """
    expected = np.empty(words(nbytes), np.int64)
    fill(expected, seed)
    np.add(expected, 1, out=expected)
    if not np.array_equal(_array(reply), expected):
        raise WrongAnswer(f"some of the {nbytes} bytes that came back are wrong")
