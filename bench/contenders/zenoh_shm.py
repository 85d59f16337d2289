"""Eclipse Zenoh with shared memory: publish-subscribe each way, as in its own ping-pong example."""

from __future__ import annotations

import contextlib
import glob
import importlib
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from ..harness.contender import Contender
from ..harness.content import respond, view, words

_THRESHOLD_BYTES = 3072  # below it, Zenoh itself doesn't use shared memory
_SEGMENT_TENSORS = 4
_SMALLEST_SEGMENT_BYTES = 16 << 20
_DISCOVERY_S = 10.0


class _Side:
    """One side: a session, a publisher and a subscriber; the Python binding gives no view of shared memory."""

    def __init__(self, directory: str, max_nbytes: int, mine: str, theirs: str, listens: bool) -> None:
        zenoh: Any = importlib.import_module("zenoh")  # its type stubs are incomplete
        config = zenoh.Config()
        config.insert_json5("mode", json.dumps("peer"))
        config.insert_json5("scouting/multicast/enabled", "false")
        endpoints = json.dumps([f"unixsock-stream/{directory}/z"])
        config.insert_json5("listen/endpoints" if listens else "connect/endpoints", endpoints)
        if not listens:
            config.insert_json5("listen/endpoints", "[]")
        config.insert_json5("transport/shared_memory/enabled", "true")
        self._session = zenoh.open(config)
        segment_bytes = max(_SEGMENT_TENSORS * max_nbytes, _SMALLEST_SEGMENT_BYTES)
        self._provider = zenoh.shm.ShmProvider.default_backend(segment_bytes)
        self._policy = zenoh.shm.BlockOn(zenoh.shm.GarbageCollect())
        self._subscriber = self._session.declare_subscriber(theirs)
        self._publisher = self._session.declare_publisher(
            mine,
            congestion_control=zenoh.CongestionControl.BLOCK,
            priority=zenoh.Priority.REAL_TIME,
            express=True,
        )
        self._private: dict[int, tuple[bytearray, torch.Tensor]] = {}

    def wait_for_peer(self) -> None:
        """Wait until publisher and subscriber have discovered each other.

        Raises:
            RuntimeError: They have not within ten seconds.
        """
        deadline = time.monotonic() + _DISCOVERY_S
        while not self._publisher.matching_status.matching:
            if time.monotonic() > deadline:
                raise RuntimeError(f"zenoh: the server did not subscribe within {_DISCOVERY_S:g} s")
            time.sleep(0.01)

    def tensor(self, nbytes: int) -> torch.Tensor:
        """A private tensor over a bytearray; the binding copies from bytearray and bytes only."""
        if nbytes not in self._private:
            memory = bytearray(words(nbytes) * 8)
            self._private = {nbytes: (memory, torch.frombuffer(memory, dtype=torch.int64))}
        return self._private[nbytes][1]

    def put(self, nbytes: int) -> None:
        """Publish the private tensor of this size."""
        memory = self._private[nbytes][0]
        if nbytes < _THRESHOLD_BYTES:
            self._publisher.put(memory)
            return
        shared = self._provider.alloc(nbytes, policy=self._policy)
        shared[:] = memory
        self._publisher.put(shared)

    def take(self) -> torch.Tensor:
        """The next sample's bytes."""
        return view(self._subscriber.recv().payload.to_bytes())

    def close(self) -> None:
        """Close the session and free the shared memory."""
        self._session.close()
        del self._provider, self._publisher, self._subscriber


class ZenohSharedMemory(Contender):
    """A session on each side over a Unix socket, payloads in Zenoh's shared memory."""

    name = "eclipse-zenoh, shared memory"
    how = "peers over unixsock-stream, put of an allocated ZShmMut from 3 KiB on (of bytes below), real-time, express"
    copies = "4: into shared memory and to_bytes, each way; the binding gives no view"
    reply = "view of private bytes"
    packages = (("zenoh", "eclipse-zenoh"),)
    in_flight = 2

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        side = _Side(self.directory, self.max_nbytes, "bench/replies", "bench/requests", listens=True)
        try:
            ready()
            while True:
                request = side.take()
                respond(request, side.tensor(request.nbytes))
                side.put(request.nbytes)
        finally:
            side.close()

    def connect(self) -> None:
        self._side = _Side(self.directory, self.max_nbytes, "bench/requests", "bench/replies", listens=False)
        self._side.wait_for_peer()

    def prepare(self, nbytes: int) -> torch.Tensor:
        self._nbytes = nbytes
        return self._side.tensor(nbytes)

    def send(self) -> None:
        self._side.put(self._nbytes)

    def receive(self) -> torch.Tensor:
        return self._side.take()

    def close(self) -> None:
        self._side.close()

    @classmethod
    def clean(cls, directory: str) -> None:
        """Zenoh names its segments itself, and they outlive its sessions: remove those that no other process maps."""
        mapped: set[str] = set()
        for path in glob.glob("/proc/[0-9]*/maps"):
            if path == f"/proc/{os.getpid()}/maps":  # this process's session is closed
                continue
            with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
                mapped.update(line.split()[-1] for line in file if line.rstrip().endswith(".zenoh"))
        for path in glob.glob("/dev/shm/*.zenoh"):
            if path not in mapped and os.stat(path).st_uid == os.geteuid():
                os.unlink(path)
