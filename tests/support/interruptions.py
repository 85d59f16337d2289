"""Runs something in the middle of something else, at each place where CPython may run a signal handler or a finalizer.

That is: where a function begins, after a call, at a loop's jump back, and where a container is made.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any, TypeVar

Result = TypeVar("Result")

_OPERATIONS = ("RESUME", "CALL", "BUILD_", "BINARY_SUBSCR", "BINARY_SLICE", "JUMP_BACKWARD", "POP_JUMP_BACKWARD")


class Interruption:
    """Does something else once, at the ``place``-th such place of a module's functions."""

    def __init__(self, module: ModuleType, place: int) -> None:
        self.where = ""
        self._file = module.__file__
        self._left = place
        self._last: dict[FrameType, str] = {}

    def during(self, outer: Callable[[], Result], inner: Callable[[], None]) -> Result:
        """Do ``outer``, and ``inner`` in the middle of it; what ``outer`` returns."""
        self._inner = inner
        previous = sys.gettrace()
        sys.settrace(self._trace)
        try:
            return outer()
        finally:
            sys.settrace(previous)
            self._last.clear()

    def _trace(self, frame: FrameType, event: str, _argument: Any) -> Any:
        code = frame.f_code
        if code.co_filename != self._file:
            return None
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            self._last[frame] = "RESUME"
        elif event == "opcode":
            if self._last[frame].startswith(_OPERATIONS):
                self._left -= 1
                if self._left == 0:
                    self.where = f"{code.co_name}, line {frame.f_lineno}"
                    self._inner()  # which is not traced itself
            self._last[frame] = dis.opname[code.co_code[frame.f_lasti]]
        return self._trace


def interruptions(module: ModuleType) -> Iterator[Interruption]:
    """One for each place, until one was used that found no such place any more."""
    place = 0
    while True:
        place += 1
        interruption = Interruption(module, place)
        yield interruption
        if not interruption.where:
            assert place > 1, "nothing was interrupted"
            return
