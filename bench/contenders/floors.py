"""Floors: what the machine takes to wake another process, and to tell it without waking."""

from __future__ import annotations

import posix_ipc
import torch

from .base import Contender


class SemaphorePingPong(Contender):
    """Two semaphores: each side blocks until the other posts. No byte is sent."""

    name = "bare semaphore ping-pong"
    copies = "–"

    @staticmethod
    def _pair(address: str, flags: int) -> tuple[posix_ipc.Semaphore, posix_ipc.Semaphore]:
        stem = "/bench-" + address.rsplit("/", 2)[-2]
        return posix_ipc.Semaphore(stem + "-there", flags), posix_ipc.Semaphore(stem + "-back", flags)

    @classmethod
    def serve(cls, address: str, nbytes: int) -> None:
        there, back = cls._pair(address, posix_ipc.O_CREX)
        print("ready", flush=True)
        there.acquire()
        there.unlink()
        back.unlink()
        back.release()
        while True:
            there.acquire()
            back.release()

    def connect(self, address: str, nbytes: int) -> None:
        self._there, self._back = self._pair(address, 0)
        self._round_trip()

    def call(self, value: int) -> torch.Tensor:
        self._round_trip()
        return torch.tensor(value + 1, dtype=torch.uint8)

    def close(self) -> None:
        self._there.close()
        self._back.close()

    def _round_trip(self) -> None:
        self._there.release()
        self._back.acquire()
