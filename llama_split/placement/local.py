"""Starts a worker process for a trusted side that was given none, and ends it together with its owner."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO

from ..errors import WorkerFailed
from .import_path import ROOT, without_current_directory

READY = "ready"
"""The first word that a worker prints when it answers calls."""

_STOP_TIMEOUT_S = 10.0
_DYING_S = 0.5
_PR_SET_PDEATHSIG = 1
_LONG_SPINS = "100000"
_PROGRAM = os.path.join(ROOT, "llama_split", "__main__.py")
_SOCKET_PATH_BYTES = 107  # the kernel's limit
_PATH_BYTES = len("/llama-split-12345678/worker.ipc")


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends, for whatever reason.

    Raises:
        WorkerFailed: the parent has already ended.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise WorkerFailed("the process that started this worker has ended")


def remove_directory_of(address: str) -> None:
    """Remove the private directory of a worker's address, in case the parent could not."""
    path = address.removeprefix("ipc://")
    with contextlib.suppress(OSError):
        os.unlink(path)  # still there if the server was not closed properly
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(path))


def temporary_directory(room: int) -> str:
    """The directory for temporary files; /tmp if that path leaves fewer than ``room`` bytes for a socket's path.

    Raises:
        WorkerFailed: /tmp is needed and can't be written.
    """
    directory = tempfile.gettempdir()
    try:
        fits = len(directory.encode()) + room <= _SOCKET_PATH_BYTES
    except UnicodeEncodeError:  # ZeroMQ accepts UTF-8 only
        fits = False
    if fits:
        return directory
    if not os.access("/tmp", os.W_OK | os.X_OK):
        raise WorkerFailed(
            f"no socket can be created in {directory!r}: its path must be UTF-8 of at most {_SOCKET_PATH_BYTES - room} "
            "bytes, and /tmp can't be written: set TMPDIR to another directory"
        )
    return "/tmp"


def _interpreter_options() -> list[str]:
    """This interpreter's options that decide where modules are imported from."""
    flags = {"-I": sys.flags.isolated, "-E": sys.flags.ignore_environment, "-s": sys.flags.no_user_site}
    return [option for option, is_set in flags.items() if is_set]


def _environment(*, computes_alone: bool) -> dict[str, str]:
    """This process's environment for a worker, with the current directory removed from PYTHONPATH."""
    found = {**({"GOMP_SPINCOUNT": _LONG_SPINS} if computes_alone else {}), **os.environ}
    path = without_current_directory(found.pop("PYTHONPATH", ""))
    return {**found, "PYTHONPATH": path} if path else found


class WorkerProcess:
    """A worker in a process of its own, at an address in a private directory; ends with the ``with`` block.

    The kernel ends the worker when the thread that started it ends, which is the caller of ``revive`` once that was
    used.

    Args:
        options: those of ``llama-split worker``.
        verbose: send the worker's log to this process's standard error.
        computes_alone: this side has nothing to compute between its calls, as where the worker keeps the KV: the
            worker's idle threads then spin for about 1 ms, in place of 0.1, before they sleep.
    """

    def __init__(self, options: Sequence[str], *, verbose: bool = False, computes_alone: bool = False) -> None:
        self._environment = _environment(computes_alone=computes_alone)
        self._directory = tempfile.mkdtemp(prefix="llama-split-", dir=temporary_directory(_PATH_BYTES))
        self.address = f"ipc://{self._directory}/worker.ipc"
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the worker runs
        self._errors = None if verbose else self._log
        command = [sys.executable, *_interpreter_options(), _PROGRAM, "worker", "--bind", self.address]
        self._command = [*command, "--parent", str(os.getpid()), *options]
        self._process, self._stdout = self._start()

    def _start(self) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        """Start the process; returns it, and what it prints."""
        reading, writing = os.pipe()
        # In a session of its own, Ctrl-C reaches this process only, which then ends the worker properly.
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=self._errors,
            env=self._environment,
            start_new_session=True,
        )
        os.close(writing)
        return process, os.fdopen(reading, "rb")

    def wait_until_ready(self) -> None:
        """Wait until the worker answers calls.

        Raises:
            WorkerFailed: it ended instead; the message has the last line of its log.
        """
        line = self._stdout.readline()
        if not line.startswith(READY.encode()):
            self._process.wait()
            self._log.seek(0)
            logged = self._log.read().decode(errors="replace").strip().splitlines()
            code = self._process.returncode
            ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            reason = logged[-1].removeprefix("error: ") if logged and code >= 0 else ended
            raise WorkerFailed(f"the worker did not start: {reason}")

    def revive(self) -> None:
        """If the worker has ended, start it again at the same address and wait until it answers.

        Raises:
            WorkerFailed: it ended again, or another user owns the address's directory now.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A killed process loses its connections a moment before it can be waited for.
            self._process.wait(_DYING_S)
        if self._process.poll() is None:
            return
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._directory, 0o700)  # a worker that ended properly has removed it
        if os.lstat(self._directory).st_uid != os.getuid():
            raise WorkerFailed(f"the worker can't be started again: another user owns {self._directory} now")
        self._stdout.close()
        self._process, self._stdout = self._start()
        self.wait_until_ready()

    def stop(self) -> None:
        """End the worker, and kill it if that takes too long. A second call does nothing."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._stdout.close()
        self._log.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()
