"""Runs scripts in children forked from a process that has imported torch already: ``mother.py FD``.

FD is a socket. A message ``[SCRIPT, ARGUMENT, …]`` in JSON comes with the descriptor that takes what the script
prints; the answer is the child's process id. A message that is a process id alone is answered with the exit code of
that child, once it has ended.
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

import shmtransport  # noqa: F401

PR_SET_PDEATHSIG = 1


def serve(sock: socket.socket) -> str | None:
    """Fork for each script until the socket is closed; in a child, which script to run."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(sock, 1 << 16, 1)
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
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # should the tests themselves be killed
            sys.argv = message
            sys.path[0] = os.path.dirname(message[0])
            for standard in (1, 2):
                os.dup2(descriptors[0], standard)
            os.close(descriptors[0])
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return str(message[0])
        os.close(descriptors[0])
        sock.send(json.dumps(child).encode())


gc.collect()
gc.freeze()
signal.signal(signal.SIGINT, signal.SIG_IGN)
script = serve(socket.socket(fileno=int(sys.argv[1])))
kept = None if script is None else runpy.run_path(script, run_name="__main__")  # until the interpreter ends
