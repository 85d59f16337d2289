"""The stage of every attack: a server process, and two innocent clients in processes of their own, one per channel.

Whatever an attacker does, afterwards (``Stage.undisturbed``)

* the innocent clients have gone on calling, while it lasted and after it; every result was right, none took long;
* the server lives; its memory never grew beyond a bound; it holds as many file descriptors and as many names in
  /dev/shm as before;
* a new client is served, on either channel.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shmtransport import CHANNEL_KINDS, Client
from shmtransport.protocol.messages import ChannelKind
from tests.support.children import Child, Mother
from tests.support.helpers import eventually
from tests.support.process import ROOT

from .scene import Attack, Scene

MAX_CLIENTS = 24
HANDSHAKE_TIMEOUT_S = 2.0
GROWTH_BYTES = 100 << 20
"""How far the server's memory may grow, whatever is done to it."""
OPTIONS = {"max_clients": MAX_CLIENTS, "max_arena_bytes": 64 << 20, "max_total_arena_bytes": 256 << 20}
PATIENCE_S = 5.0
"""How long a call of an innocent client may take during an attack."""
_CALLS_AFTER = 5


class Talker(Child):
    """A child process whose output is read at once, so that it never blocks on writing."""

    def __init__(self, mother: Mother, script: str, *arguments: str) -> None:
        super().__init__(mother, ROOT / "tests/support/processes" / script, *arguments)
        self.lines: list[str] = []
        self.wait_until_ready()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        for line in self.output:
            self.hear(line.rstrip("\n"))

    def hear(self, line: str) -> None:
        """Read one line."""
        self.lines.append(line)

    def end(self) -> None:
        self.signal(9)
        self._listener.join()
        super().end()


class Report(NamedTuple):
    """What an innocent client reports; see ``processes/innocent.py``."""

    calls: int
    wrong: int
    error: str | None
    worst_s: float


class Innocent(Talker):
    """A client that calls, checks the results and reports."""

    def __init__(self, mother: Mother, address: str, channel: ChannelKind) -> None:
        self.channel = channel
        self.report = Report(0, 0, None, 0.0)
        self.worst_s = 0.0
        super().__init__(mother, "innocent.py", address, channel)

    def hear(self, line: str) -> None:
        if not line.startswith("{"):
            self.lines.append(line)
            return
        self.report = Report(**json.loads(line))
        self.worst_s = max(self.worst_s, self.report.worst_s)

    def goes_on(self, since: int | None = None) -> bool:
        """Check that it makes some more calls, beyond those that it has made by now, or beyond ``since``."""
        enough = (self.report.calls if since is None else since) + _CALLS_AFTER
        return eventually(lambda: self.report.calls >= enough or self.report.error is not None, within_s=20.0)

    def assert_undisturbed(self, since: int) -> None:
        assert self.goes_on(since), f"the {self.channel} client's calls stand still"
        assert self.report.error is None, f"the {self.channel} client: {self.report.error}"
        assert self.report.wrong == 0, f"the {self.channel} client had {self.report.wrong} wrong results"
        assert self.worst_s < PATIENCE_S, f"the {self.channel} client waited {self.worst_s:.2f} s for a call"


class Footprint(NamedTuple):
    """What a process holds: how many file descriptors, and which names in /dev/shm."""

    descriptors: int
    names: frozenset[str]


class Stage:
    """The server and the innocent clients.

    Args:
        mother: What they are forked from.
        address: The server's.
        kind: Which kind of server: "Server", "threads" for one with several, or "AsyncServer".
    """

    def __init__(self, mother: Mother, address: str, kind: str = "Server") -> None:
        self.address = address
        options = json.dumps({**OPTIONS, **({} if kind == "Server" else {"threads": 3})})
        which = [kind] if kind == "AsyncServer" else []
        self.server = Talker(mother, "watched_server.py", address, str(HANDSHAKE_TIMEOUT_S), options, *which)
        self.innocents = [Innocent(mother, address, channel) for channel in CHANNEL_KINDS]
        for innocent in self.innocents:
            assert innocent.goes_on()
        self._before = self._settled()
        self._memory = self._status("VmRSS")

    def end(self) -> None:
        for process in (*self.innocents, self.server):
            process.end()

    def endure(self, attack: Attack) -> None:
        """Have an attack made, and hold the server to the rules above meanwhile."""
        with self.undisturbed():
            scene = Scene(self.address, self.server.pid, attack.channel, self._calls)
            try:
                attack.act(scene)
            finally:
                scene.close()

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Hold the server to the rules above while the ``with`` block runs."""
        calls = self._calls()
        for innocent in self.innocents:
            innocent.worst_s = 0.0
        yield
        assert os.path.exists(f"/proc/{self.server.pid}/fd"), f"the server has ended: {self.server.lines[-30:]}"
        after = self._calls()
        for innocent, before, now in zip(self.innocents, calls, after, strict=True):
            innocent.assert_undisturbed(since=now)
            assert innocent.report.calls > before
        growth = self._status("VmHWM") - self._memory
        assert growth < GROWTH_BYTES, f"the server's memory grew by {growth >> 20} MiB"
        self._assert_footprint()
        self._serves_anyone()
        uncaught = [line for line in self.server.lines if line.startswith(("Exception ignored", "Exception in"))]
        assert not uncaught, self.server.lines[-30:]

    def _serves_anyone(self) -> None:
        x = torch.arange(100.0)
        for channel in CHANNEL_KINDS:
            with Client(self.address, channel=channel, arena_bytes=4096, timeout_s=10.0) as client:
                assert torch.equal(client.call("double", x), x * 2)

    def _calls(self) -> list[int]:
        """How many calls each of the innocent clients has made."""
        return [innocent.report.calls for innocent in self.innocents]

    def _settled(self) -> Footprint:
        """What the server holds of the innocent clients alone: it comes back to that after others were served."""
        for _ in range(4):
            before = self._footprint()
            self._serves_anyone()
            if eventually(lambda before=before: self._footprint() == before, within_s=5.0):
                return before
        raise AssertionError(f"the server holds {before}, then {self._footprint()}; open: {self._descriptors()}")

    def _assert_footprint(self) -> None:
        """Check that the server drops what has gone."""
        assert eventually(lambda: self._footprint() == self._before, within_s=20.0), (
            f"{self._footprint()} was {self._before}; open: {self._descriptors()}"
        )

    def _footprint(self) -> Footprint:
        return Footprint(len(os.listdir(f"/proc/{self.server.pid}/fd")), frozenset(self._names()))

    def _descriptors(self) -> list[str]:
        """What the server's descriptors refer to, for a failure's message."""
        opened = []
        for descriptor in Path(f"/proc/{self.server.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                opened.append(os.readlink(descriptor))
        return sorted(opened)

    def _names(self) -> Iterator[str]:
        """Names that the server has in /dev/shm."""
        for line in Path(f"/proc/{self.server.pid}/maps").read_text().splitlines():
            if "/dev/shm/shmtransport-" in line and not line.endswith("(deleted)"):
                yield line.rsplit("/", 1)[-1]

    def _status(self, field: str) -> int:
        """A size in the server's status, in bytes."""
        status: dict[str, Any] = dict(
            line.split(":", 1) for line in Path(f"/proc/{self.server.pid}/status").read_text().splitlines()
        )
        return int(status[field].split()[0]) << 10
