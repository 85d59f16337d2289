"""The rule for every decoder: for any input it gives a valid value or a refusal, quickly, in bounded memory.

A refusal is ``PeerProtocolError``, or what else a target's docstring names. Whatever else happens is ``Broken``:
another exception, also one in a destructor; seconds of computing; an allocation of ``HEADROOM_BYTES``; something that
is still held after the input and its outcome are gone.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import ClassVar

from shmtransport.errors import PeerProtocolError

CPU_SECONDS = 3.0
HEADROOM_BYTES = 512 << 20


class Target:
    """One decoder: generates inputs for it, and feeds them to it."""

    name: ClassVar[str]
    refusals: ClassVar[tuple[type[Exception], ...]] = (PeerProtocolError,)

    def generate(self, random: Random) -> bytes:
        """Generate an input; a generator in the same state gives the same input."""
        raise NotImplementedError

    def carrying(self, message: bytes) -> bytes:
        """Build the input that contains this one encoded message, value or list."""
        return message

    def check(self, data: bytes) -> None:
        """Decode one input, and check that the value is one that may come out; raise the refusal, if any."""
        raise NotImplementedError

    def leftovers(self) -> str:
        """Describe what is still held after the last input; an empty text if nothing is."""
        return ""

    def close(self) -> None:
        """Give back what the target itself has made."""


class Broken(Exception):
    """An input that broke the rule."""

    def __init__(self, target: Target, data: bytes, why: str) -> None:
        super().__init__(f"{target.name}: {why}; the input is {data.hex()}")
        self.target = target
        self.data = data
        self.why = why


class _TooLong(BaseException):
    """Raised by the timer; no ``except Exception`` in the code under test may catch it."""


class Tally:
    """Counts the outcomes of a target's inputs."""

    def __init__(self) -> None:
        self.valid = 0
        self.refused = 0
        self.seconds = 0.0

    @property
    def inputs(self) -> int:
        return self.valid + self.refused


_unraisable: list[str] = []


def hold(target: Target, data: bytes) -> bool:
    """Feed one input; return whether it was valid. Use it within ``watched()``.

    Raises:
        Broken: neither a valid value nor a refusal came of it, or something stays held.
    """
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        target.check(data)
        valid = True
    except target.refusals:
        valid = False
    except _TooLong:
        raise Broken(target, data, f"it took more than {CPU_SECONDS} s") from None
    except Exception as error:
        raise Broken(target, data, f"{type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    left = target.leftovers()
    if _unraisable:
        left = f"an exception that nobody could catch: {_unraisable.pop()}"
    if left:
        raise Broken(target, data, left)
    return valid


def run(
    target: Target, random: Random, inputs: int, tally: Tally, note: Callable[[bytes], None] = lambda _data: None
) -> None:
    """Hold a target to the rule with that many inputs, noting each beforehand. Use it within ``watched()``.

    Raises:
        Broken: with the first input that broke the rule.
    """
    started = time.perf_counter()
    data = b""
    mapped = _mapped_segments()
    for _ in range(inputs):
        data = target.generate(random)
        note(data)
        if hold(target, data):
            tally.valid += 1
        else:
            tally.refused += 1
    gc.collect()
    if (more := _mapped_segments() - mapped) > 0:
        raise Broken(target, data, f"{more} pieces of shared memory stay mapped; this is the last of {inputs} inputs")
    tally.seconds += time.perf_counter() - started


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Bound what one input may take, for as long as this lasts."""

    def too_long(_number: int, _frame: FrameType | None) -> None:
        raise _TooLong

    def remember(unraisable: sys.UnraisableHookArgs) -> None:
        _unraisable.append(f"{type(unraisable.exc_value).__name__}: {unraisable.exc_value}")

    gc.collect()
    handler = signal.signal(signal.SIGPROF, too_long)
    hook, sys.unraisablehook = sys.unraisablehook, remember
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space_bytes() + HEADROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        sys.unraisablehook = hook
        signal.signal(signal.SIGPROF, handler)
        _unraisable.clear()


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _mapped_segments() -> int:
    return Path("/proc/self/maps").read_text().count("/dev/shm/")
