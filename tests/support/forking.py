"""Forking children for scripts, in a process that has the imports done."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import tempfile

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Be killed when the parent ends, should the tests themselves be killed."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stand_on(descriptors: list[int]) -> None:
    """Make these the process's standard input, output and error."""
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
        os.close(descriptor)


def serve(sock: socket.socket) -> str | None:
    """Fork for each script until the socket is closed; in a child, which script to run.

    A message ``{"script": [SCRIPT, ARGUMENT, …], "environment": {…}}`` in JSON comes with the descriptors that become
    the script's standard input, output and error; the environment is what differs from this process's. The answer is
    the child's process id. A message that is a process id alone is answered with the exit code of that child, once it
    has ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        data, descriptors, _, _ = socket.recv_fds(sock, 1 << 18, 3)
        if not data:
            return None
        message = json.loads(data)
        if isinstance(message, int):
            _, status = os.waitpid(message, 0)
            sock.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
            continue
        child = os.fork()
        if child == 0:
            sock.close()
            die_with_parent()
            _libc.on_exit(_libc._exit, None)  # once Python has ended: torch's C++ destructors take a tenth of a second
            sys.argv = message["script"]
            sys.path[0] = os.path.dirname(sys.argv[0])
            os.environ.update(message["environment"])
            tempfile.tempdir = None
            stand_on(descriptors)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return str(sys.argv[0])
        for descriptor in descriptors:
            os.close(descriptor)
        sock.send(json.dumps(child).encode())
