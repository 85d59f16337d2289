"""What a contender must do, and what it says about itself."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, ClassVar, Literal

import torch

from ..content import words

Group = Literal["ours", "peer", "floor"]


class Contender(ABC):
    """One way of calling another process with a tensor of N bytes that is answered by a tensor of N bytes.

    An object is made in each of the two processes: the client's with ``link``, ``connect``, ``prepare``, ``send``,
    ``receive`` and ``close``, the server's with ``serve``. ``directory`` is empty, for both, and removed afterwards;
    ``max_nbytes`` is the largest tensor that will be sent.

    A measured call is ``send`` and ``receive``. By then ``prepare`` has brought the request to where its producer
    would have written it: into the transport's own memory if the contender is *in place*, else into private memory.
    The server's part is measured whole: it receives, makes a tensor of what it has received, gets a place for the
    reply (in the transport's memory if in place, else a private tensor that is kept), lets ``content.respond`` answer,
    and sends.
    """

    name: ClassVar[str]
    group: ClassVar[Group] = "peer"
    how: ClassVar[str]
    """How the other's software is used, in a line."""
    copies: ClassVar[str]
    """How often a round trip copies the tensor's bytes, kernel included, and where."""
    reply: ClassVar[str]
    """What the caller gets: whether it is private, a view, or overwritten by later calls; never the request itself."""
    packages: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Modules that it needs, and what pip calls them."""
    in_flight: ClassVar[int] = 1
    """How many calls can be under way at once, for the throughput benchmark."""
    warm_up_calls: ClassVar[int] = 8
    """How many calls, at least, until all pages that it uses in turns are mapped."""
    moves_tensors: ClassVar[bool] = True
    """False for a floor that has no tensor and so no size."""
    has_server: ClassVar[bool] = True
    """False where no process of ours answers: it has none, or the contender starts it itself."""

    def __init__(self, directory: str, max_nbytes: int) -> None:
        self.directory = directory
        self.max_nbytes = max_nbytes

    @classmethod
    def unavailable(cls) -> str:
        """Why it can't run here; empty if it can."""
        missing = [package for module, package in cls.packages if importlib.util.find_spec(module) is None]
        return f"not installed: {', '.join(missing)}" if missing else ""

    @classmethod
    def versions(cls) -> dict[str, str]:
        """The versions of the packages that it uses."""
        return {package: version(package) for _, package in cls.packages}

    def link(self) -> Any:
        """In the client's process, before the server's is started: what the server is given, by pickling."""
        return None

    @abstractmethod
    def serve(self, link: Any, ready: Callable[[], None]) -> None:
        """In the server's process: call ``ready``, then answer until ``SystemExit`` is raised by a signal."""

    @abstractmethod
    def connect(self) -> None:
        """The server is ready: get ready to call."""

    @abstractmethod
    def prepare(self, nbytes: int) -> torch.Tensor:
        """The place of the next request, to be written before ``send``."""

    @abstractmethod
    def send(self) -> None:
        """Send what was prepared."""

    @abstractmethod
    def receive(self) -> torch.Tensor:
        """The reply to the oldest request that is under way."""

    @abstractmethod
    def close(self) -> None:
        """The end; the server may be gone already."""

    @classmethod
    def clean(cls, directory: str) -> None:
        """After both processes have ended: remove what they have left in /dev/shm under this directory's name."""
        for path in glob.glob(f"/dev/shm/*{os.path.basename(directory)}*"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def server_pids(self) -> Sequence[int]:
        """Processes that work for the server besides the one that ``serve`` runs in."""
        return ()


class PrivateTensors:
    """Private tensors, one of each size and number in flight, written once so that their pages are there."""

    def __init__(self, in_flight: int) -> None:
        self._in_flight = in_flight
        self._rings: dict[int, list[torch.Tensor]] = {}
        self._turn = 0

    def next(self, nbytes: int) -> torch.Tensor:
        """The tensor whose turn it is."""
        ring = self._rings.get(nbytes)
        if ring is None:
            self._rings = {}  # one size at a time: the largest take 128 MiB each
            ring = [torch.zeros(words(nbytes), dtype=torch.int64) for _ in range(self._in_flight)]
            self._rings[nbytes] = ring
        self._turn = (self._turn + 1) % self._in_flight
        return ring[self._turn]
