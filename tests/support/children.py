"""Child processes that cost no import: forked from a process that has imported torch once for all."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from os import pidfd_open  # tests take it away from ``os``
from pathlib import Path
from typing import IO

from tests.support.process import ROOT, Process

beside_us: int | None = None
"""Where this process was forked by ``processes/collected.py``: the socket of the process that forks for its tests."""


class Mother:
    """The process that children are forked from; it waits for them, too.

    Args:
        sock: its end of a socket that it reads messages from, see ``tests.support.forking``.
        popen: the process, where it is to be ended with its children.
    """

    def __init__(self, sock: socket.socket, popen: subprocess.Popen[bytes] | None = None) -> None:
        self._socket, self._popen = sock, popen

    @classmethod
    def beside_us(cls) -> Mother | None:
        """The one that was forked with this process, if there is one; it ends with the tests."""
        return None if beside_us is None else cls(socket.socket(fileno=os.dup(beside_us)))

    @classmethod
    def start(cls, *first: str | Path, environment: dict[str, str] | None = None) -> Mother:
        """Start a process that imports what is needed, and wait for nothing.

        Args:
            first: a script with its arguments that it runs first, for what that imports.
            environment: its own and its children's; by default that of ``Process``.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = ROOT / "tests/support/processes/mother.py"
        with theirs:
            return cls(
                ours,
                subprocess.Popen(
                    [sys.executable, str(program), str(theirs.fileno()), *map(str, first)],
                    pass_fds=[theirs.fileno()],
                    env=environment or Process.environment(),
                ),
            )

    def fork(
        self,
        script: str | Path,
        arguments: tuple[str, ...],
        standard: list[int],
        environment: dict[str, str] | None = None,
    ) -> int:
        """Run a script with these descriptors as its standard input, output and error. Its process id."""
        its_own = {"TMPDIR": tempfile.gettempdir(), **(environment or {})}
        message = {"script": [str(script), *arguments], "environment": its_own}
        socket.send_fds(self._socket, [json.dumps(message).encode()], standard)
        return int(json.loads(self._socket.recv(64)))

    def wait(self, pid: int) -> int:
        """The exit code of a child, once it has ended."""
        self._socket.send(json.dumps(pid).encode())
        return int(json.loads(self._socket.recv(64)))

    def end(self) -> None:
        self._socket.close()
        if self._popen is not None:
            self._popen.wait(10)


class Child(Process):
    """A Python child process that prints "ready" once it is, as ``Process``, but forked.

    Args:
        mother: what it is forked from.
        script: what it runs.
        arguments: the script's.
        said: what its standard input is read from; by default nothing.
        errors: where its standard error goes; by default to its output.
    """

    def __init__(
        self,
        mother: Mother,
        script: str | Path,
        *arguments: str,
        said: IO[str] | None = None,
        errors: IO[str] | None = None,
    ) -> None:
        self._mother = mother
        self._code: int | None = None
        reader, writer = os.pipe()
        self._output = os.fdopen(reader)
        with open(os.devnull) as nothing:
            standard = [(said or nothing).fileno(), writer, writer if errors is None else errors.fileno()]
            self._pid = mother.fork(script, arguments, standard)
        os.close(writer)

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def output(self) -> IO[str]:
        return self._output

    def wait(self, timeout_s: float = 30.0) -> int:
        if self._code is None:
            descriptor = pidfd_open(self._pid)
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
        self.wait()
        self.output.close()
