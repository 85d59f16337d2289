"""Forking children for scripts, in a process that has the imports done."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import weakref

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
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]
        finalizer.atexit = False  # of what was imported; torch alone has some two hundred, a twentieth of a second
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


def run(script: str) -> None:
    """Run a script as Python runs its main program, and end this process as Python does, but for the interpreter.

    To take it apart would take half a second, for all that was imported before the fork. A test that is about an
    interpreter's end starts one of its own.
    """
    code = 0
    kept: object = None  # the script's names live until its exit handlers have run
    try:
        kept = runpy.run_path(script, run_name="__main__")
    except KeyboardInterrupt:
        raise  # Python then ends itself by the signal
    except SystemExit as ended:
        kept = ended
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:  # noqa: BLE001 - the last place where it can be shown
        kept = error
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    del kept
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader is gone, or the script has closed it
            stream.flush()
    os._exit(code)
