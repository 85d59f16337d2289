"""Workers of pytest-xdist, forked from a process that has imported all: ``collected.py LISTENER PARENT ARGUMENT …``.

To import torch, transformers and the tests takes seconds, and each worker would do it. This process collects what
pytest's arguments name, then forks a worker for each connection to the listener; it ends when the pipe PARENT is
closed. Each worker has a /dev/shm of its own, and beside it another process in which its tests' children are forked.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import tempfile

import pytest

from shmtransport import AsyncClient, Client
from tests.support import children, forking
from tests.support.private_memory import take_private_memory

CLIENTS = (Client, AsyncClient)
BOOTSTRAP = "import sys;exec(eval(sys.stdin.readline()))"  # what execnet has a new interpreter run


def collect(arguments: list[str]) -> None:
    """Import what a run with these arguments imports; no trace of that run itself is left."""
    environment = dict(os.environ)
    defaults = [(client.__init__.__kwdefaults__, dict(client.__init__.__kwdefaults__)) for client in CLIENTS]
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        pytest.main(["--collect-only", "-qq", "-s", "-p", "no:xdist", "-p", "no:cacheprovider", *arguments])
    os.environ.clear()
    os.environ.update(environment)
    for changed, original in defaults:
        changed.update(original)
    tempfile.tempdir = None
    for name in [name for name in sys.modules if name.endswith("conftest")]:
        del sys.modules[name]  # its first lines are about the process that it is imported in
    if "llama_split.commands" in sys.modules:
        import tests.support.processes.warm  # noqa: F401
    gc.collect()
    gc.freeze()


def worker_for(listener: socket.socket, parent: int) -> list[int] | None:
    """Fork for each connection until the parent is gone; in a worker, its standard input, output and error."""
    while True:
        ready, _, _ = select.select([listener, parent], [], [])
        if listener not in ready:
            return None
        connection, _ = listener.accept()
        with connection:
            _, standard, _, _ = socket.recv_fds(connection, 1, 3)
            if os.fork() == 0:
                listener.close()
                connection.detach()  # it is closed when this process ends
                return standard
        for descriptor in standard:
            os.close(descriptor)


def fork_mother() -> str | None:
    """Fork what this worker's children are forked from; in such a child, which script to run."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        forking.die_with_parent()
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.close(nothing)
        script = forking.serve(theirs)
        if script is None:
            os._exit(0)
        return script
    theirs.close()
    children.beside_us = ours.detach()
    return None


if __name__ == "__main__":  # multiprocessing imports it in its children
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a worker's exit code is not asked for
    collect(sys.argv[3:])
    standard = worker_for(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    if standard is not None:
        forking.die_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        forking.stand_on(standard)
        take_private_memory()
        script = fork_mother()
        if script is None:
            exec(BOOTSTRAP)  # noqa: S102
        else:
            forking.run(script)
