"""What a contender must do, and what it states about itself for the tables."""

from __future__ import annotations

import contextlib
import glob
import importlib
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, ClassVar, Literal

import torch

from .content import Words, words

Group = Literal["ours", "peer", "floor"]


class Contender(ABC):
    """One way to call another process with a tensor of N bytes that is answered with a tensor of N bytes.

    Each of the two processes makes an object. The client uses ``make_endpoint``, ``connect``, ``prepare``, ``send``,
    ``receive``, ``call`` and ``close``; the server uses ``serve``.

    A measured call is ``call``, or ``send`` and ``receive``. Before it, ``prepare`` has placed the request where its
    producer would have written it: in the transport's own memory if the contender works *in place*, in private memory
    otherwise. All of the server's work counts: it receives, makes a tensor of what it received, gets memory for the
    reply (the transport's if in place, otherwise a private tensor that it keeps), lets ``content.respond`` answer, and
    sends.

    Args:
        directory: Empty, shared by both sides, removed afterwards.
        max_nbytes: The size of the largest tensor that will be sent.
    """

    name: ClassVar[str]
    group: ClassVar[Group] = "peer"
    how: ClassVar[str]
    """How the library is used, in one line."""
    copies: ClassVar[str]
    """How often a round trip copies the tensor's bytes, including by the kernel, and where."""
    reply: ClassVar[str]
    """What the caller gets: private, a view, or overwritten by later calls; never the request itself."""
    packages: ClassVar[tuple[tuple[str, str], ...]] = ()
    """The modules that it needs, each with the name of its distribution."""
    in_flight: ClassVar[int] = 1
    """How many calls may be in flight at once; the throughput benchmark uses that many."""
    warm_up_calls: ClassVar[int] = 8
    """How many calls it takes, at least, until every page that it reuses is mapped."""
    moves_tensors: ClassVar[bool] = True
    """False for a floor that carries no tensor and so has no size."""
    has_server: ClassVar[bool] = True
    """False if no server has to be started: there is none, or the contender starts it itself."""

    def __init__(self, directory: str, max_nbytes: int) -> None:
        self.directory = directory
        self.max_nbytes = max_nbytes

    @classmethod
    def import_path(cls) -> str:
        """``module:class``, from which another process imports the class."""
        return f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def unavailable(cls) -> str:
        """Why it can't run here; empty if it can."""
        missing = [package for module, package in cls.packages if importlib.util.find_spec(module) is None]
        return f"not installed: {', '.join(missing)}" if missing else ""

    @classmethod
    def versions(cls) -> dict[str, str]:
        """The versions of the packages that it uses."""
        return {package: version(package) for _, package in cls.packages}

    def make_endpoint(self) -> Any:
        """In the client, before the server starts: make what the server needs to be reached; it travels pickled."""
        return None

    @abstractmethod
    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        """In the server: call ``ready``, then answer until a signal raises ``SystemExit``."""

    @abstractmethod
    def connect(self) -> None:
        """Connect to the server, which is ready."""

    @abstractmethod
    def prepare(self, nbytes: int) -> Words:
        """The next request's tensor, to be written before ``send``."""

    @abstractmethod
    def send(self) -> None:
        """Send what was prepared."""

    @abstractmethod
    def receive(self) -> Words:
        """The reply to the oldest request in flight."""

    def call(self) -> Words:
        """Send what was prepared, and wait for its reply, while no other request is in flight."""
        self.send()
        return self.receive()

    @abstractmethod
    def close(self) -> None:
        """Release everything; the server may be gone already."""

    @classmethod
    def clean(cls, directory: str) -> None:
        """After both processes have ended: remove what they left in /dev/shm under this directory's name."""
        for path in glob.glob(f"/dev/shm/*{os.path.basename(directory)}*"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def server_pids(self) -> Sequence[int]:
        """Processes that work for the server, besides the one that runs ``serve``."""
        return ()


def import_contender(path: str) -> type[Contender]:
    """The class with this ``import_path``."""
    module, _, name = path.partition(":")
    contender: type[Contender] = getattr(importlib.import_module(module), name)
    return contender


class PrivateTensors:
    """Private tensors, used in turn: one for each call in flight, zeroed so that their pages are mapped."""

    def __init__(self, in_flight: int) -> None:
        self._in_flight = in_flight
        self._nbytes = 0
        self._tensors: list[torch.Tensor] = []
        self._turn = 0

    def next(self, nbytes: int) -> torch.Tensor:
        """The tensor whose turn it is; a new size replaces all of them, since the largest take 128 MiB each."""
        if nbytes != self._nbytes:
            self._tensors = []
            self._tensors = [torch.zeros(words(nbytes), dtype=torch.int64) for _ in range(self._in_flight)]
            self._nbytes = nbytes
        self._turn = (self._turn + 1) % self._in_flight
        return self._tensors[self._turn]
