"""Workers of pytest-xdist that are forked from one process, which imports and collects everything once for all."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence

from tests.support.commands import environment
from tests.support.process import ROOT

_PROCESSES = ROOT / "tests/support/processes"


class ForkedWorkers:
    """The process that workers are forked from; it ends when this is closed, or with this process.

    Args:
        address: a path for its socket.
        arguments: what pytest is to collect.
    """

    def __init__(self, address: str, arguments: Sequence[str]) -> None:
        self._address = address
        theirs, self._ours = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(address)
            listener.listen()
            inherited = [listener.fileno(), theirs]
            self._popen = subprocess.Popen(
                [sys.executable, str(_PROCESSES / "collected.py"), *map(str, inherited), *arguments],
                pass_fds=inherited,
                env=environment(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="10000"),  # as a worker's command sets them
            )
        os.close(theirs)

    @property
    def interpreter(self) -> str:
        """What execnet starts instead of Python: it has a worker forked."""
        return shlex.join([sys.executable, "-IS", str(_PROCESSES / "forked_python.py"), self._address])

    def close(self) -> None:
        os.close(self._ours)
        self._popen.wait(10)
