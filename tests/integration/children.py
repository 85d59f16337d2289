"""Child processes that cost no import: forked from ``scripts/mother.py``, which has imported torch once for all."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

from tests.conftest import ROOT, Process


class Mother:
    """The process that children are forked from; it waits for them, too."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._popen = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/scripts/mother.py"), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=Process.environment(),
        )
        theirs.close()

    def fork(self, script: str | Path, arguments: tuple[str, ...], output: int) -> int:
        """Run a script; what it prints goes to the descriptor ``output``. Its process id."""
        socket.send_fds(self._socket, [json.dumps([str(script), *arguments]).encode()], [output])
        return int(json.loads(self._socket.recv(64)))

    def wait(self, pid: int) -> int:
        """The exit code of a child, once it has ended."""
        self._socket.send(json.dumps(pid).encode())
        return int(json.loads(self._socket.recv(64)))

    def end(self) -> None:
        self._socket.close()
        self._popen.wait(10)


class Child(Process):
    """A Python child process that prints "ready" once it is, as ``Process``, but forked."""

    def __init__(self, mother: Mother, script: str | Path, *arguments: str) -> None:
        self._mother = mother
        self._code: int | None = None
        reader, writer = os.pipe()
        self._output = os.fdopen(reader)
        self._pid = mother.fork(script, arguments, writer)
        os.close(writer)
        self.remember()

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def output(self) -> IO[str]:
        return self._output

    def wait(self, timeout_s: float = 30.0) -> int:
        if self._code is None:
            descriptor = os.pidfd_open(self._pid)
            try:
                ended, _, _ = select.select([descriptor], [], [], timeout_s)
            finally:
                os.close(descriptor)
            if not ended:
                raise subprocess.TimeoutExpired([str(self._pid)], timeout_s)
            self._code = self._mother.wait(self._pid)
        return self._code

    def signal(self, number: int) -> None:
        if self._code is None:
            os.kill(self._pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.forget(self.wait())
