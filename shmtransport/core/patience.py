"""How long to look for a message before blocking: the rule of adaptive waiting."""

from __future__ import annotations

LOOK_S = 50e-6
"""About what it costs to block and be woken."""
_MOST_FAILURES = 8


class Patience:
    """Decides before each wait how long to look, and learns whether it was worth it.

    Looking pays if the message comes sooner than a wake-up would: where calls follow each other at once, and each side
    has a core. After a look in vain, some waits are passed without one, twice as many after each further failure, up
    to 256. So where it does not pay, one wait in 256 costs ``LOOK_S`` more.

    Args:
        spin_s: how long to look each time, in seconds; None to find out.
    """

    def __init__(self, spin_s: float | None) -> None:
        self._spin_s = spin_s
        self._failures = 0
        self._to_pass = 0

    def seconds(self) -> float:
        """How long to look before the wait that begins now."""
        if self._spin_s is not None:
            return self._spin_s
        if self._to_pass:
            self._to_pass -= 1
            return 0.0
        return LOOK_S

    def learn(self, found: bool) -> None:
        """Say whether a look has found something."""
        self._failures = 0 if found else min(self._failures + 1, _MOST_FAILURES)
        self._to_pass = 0 if found else 2**self._failures
