"""Runs scripts in children forked from a process that has imported torch already: ``mother.py FD [SCRIPT ARGUMENT …]``.

SCRIPT, if there is one, is run first: whatever it imports, its children need not import.

FD is a socket. A message ``{"script": [SCRIPT, ARGUMENT, …], "environment": {…}}`` in JSON comes with the descriptors
that become the script's standard input, output and error; the environment is what differs from this process's. The
answer is the child's process id. A message that is a process id alone is answered with the exit code of that child,
once it has ended.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import sys

from shmtransport import *  # noqa: F403 - its names are imported on first use, and so is torch

PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)


def serve(sock: socket.socket) -> str | None:
    """Fork for each script until the socket is closed; in a child, which script to run."""
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
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # should the tests themselves be killed
            libc.on_exit(libc._exit, None)  # once Python has ended: torch's C++ destructors take a tenth of a second
            sys.argv = message["script"]
            sys.path[0] = os.path.dirname(sys.argv[0])
            os.environ.update(message["environment"])
            for standard, descriptor in enumerate(descriptors):
                os.dup2(descriptor, standard)
                os.close(descriptor)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return str(sys.argv[0])
        for descriptor in descriptors:
            os.close(descriptor)
        sock.send(json.dumps(child).encode())


socket_of_tests = socket.socket(fileno=int(sys.argv[1]))
if first := sys.argv[2:]:
    sys.argv = first
    runpy.run_path(first[0])
gc.collect()
gc.freeze()  # no child looks for garbage among the imports, least of all at its end
signal.signal(signal.SIGINT, signal.SIG_IGN)
script = serve(socket_of_tests)
kept = None if script is None else runpy.run_path(script, run_name="__main__")  # until the interpreter ends
