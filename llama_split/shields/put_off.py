"""Checks that are put off: until the worker computes something else, or until the end of a forward, made together."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

_FEW_ROWS = 16
_MANY = "many rows"


class PutOff(Generic[T]):
    """Products of the forwards that are under way, each thread's by themselves.

    Those of many rows wait until the worker computes the next operation, and are then checked one by one. Those of a
    few rows, as in decoding, wait until the forward ends, and those of the same kind are then checked together.

    Args:
        check: checks a product of many rows; raises if it is wrong.
        check_together: checks several of one kind and of as many rows each; raises if one is wrong.
    """

    def __init__(self, check: Callable[[T], None], check_together: Callable[[list[T]], None]) -> None:
        self._check = check
        self._check_together = check_together
        self._of_thread = threading.local()

    def add(self, product: T, kind: Hashable, rows: int) -> None:
        """Put off the check of a product of this kind."""
        self._held[(kind, rows) if rows <= _FEW_ROWS else _MANY].append(product)

    def work(self) -> None:
        """Check those of many rows, while a worker computes. After an error all are forgotten."""
        several = self._held.get(_MANY)
        if not several:
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # several would wait for each other where a worker has their cores
        try:
            while several:
                self._check(several[-1])
                several.pop()  # only now: an interrupt leaves it to ``settle``
        except Exception:
            self._held.clear()
            raise
        finally:
            torch.set_num_threads(threads)

    def settle(self) -> None:
        """Check all that are left. After an error all are forgotten."""
        self.work()
        held = self._held
        held.pop(_MANY, None)
        try:
            while held:
                kind = next(iter(held))
                self._check_together(held[kind])
                del held[kind]
        except Exception:
            held.clear()
            raise

    @property
    def _held(self) -> defaultdict[Hashable, list[T]]:
        held: defaultdict[Hashable, list[T]] = vars(self._of_thread).setdefault("held", defaultdict(list))
        return held
