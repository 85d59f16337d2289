"""Servers and clients with a GPU, in processes on the stand-in for CUDA's driver."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.process import ROOT, Process

SERVER = ROOT / "tests/support/processes/cuda_server.py"
CLIENT = ROOT / "tests/support/processes/cuda_client.py"
LATE_US = 200_000  # so that what does not wait for a copy is sure to be seen


class Gpus:
    """Starts servers and clients.

    Args:
        spawn: Starts a process, and waits until it is ready.
        address: Where the server is to listen.
        library: The stand-in; None for the driver of this machine.
    """

    def __init__(self, spawn: Callable[..., Process], address: str, library: Path | None) -> None:
        self._spawn = spawn
        self.address = address
        self._library = "" if library is None else str(library)

    def start_server(self, settings: dict[str, Any] | None = None, **options: Any) -> Process:
        """Start ``processes/cuda_server.py`` with settings of the stand-in and options of the server."""
        return self._spawn(SERVER, self.address, self._library, json.dumps(settings or {}), json.dumps(options))

    def start_client(self, what: str, settings: dict[str, Any] | None = None) -> Process:
        """Start ``processes/cuda_client.py``."""
        return self._spawn(CLIENT, self.address, self._library, json.dumps(settings or {}), what)

    def client(self, what: str, settings: dict[str, Any] | None = None) -> Any:
        """Return what such a client prints."""
        *_, last = self.start_client(what, settings).output.read().splitlines()
        return json.loads(last)
