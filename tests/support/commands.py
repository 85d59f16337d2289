"""Running the command line, and judging what it did."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.support.children import Child, Mother
from tests.support.process import ROOT

LLAMA = [sys.executable, "-m", "llama_split"]
FORKED = ROOT / "tests/support/processes/command.py"


class Finished(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def environment(**extra: str) -> dict[str, str]:
    """This process's, without variables that settings are taken from."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **extra}


def run(*arguments: str, **extra: str) -> Finished:
    """Run the command as a user would."""
    done = subprocess.run(
        [*LLAMA, *arguments], env=environment(**extra), capture_output=True, text=True, timeout=170, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


Command = Callable[..., Finished]


def run_forked(mother: Mother, arguments: tuple[str, ...], said: str, environment: dict[str, str]) -> Finished:
    """Run the command in a process forked from one that has imported all."""
    with contextlib.ExitStack() as files:
        into = files.enter_context(tempfile.TemporaryFile("w+", errors="surrogateescape"))
        out, err = (files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
        into.write(said)
        into.flush()
        into.seek(0)
        child = mother.fork(FORKED, arguments, [into.fileno(), out.fileno(), err.fileno()], environment)
        code = mother.wait(child)
        out.seek(0)
        err.seek(0)
        return Finished(code, out.read(), err.read())


class Running(Child):
    """A command that runs in a process forked from one that has imported all; its errors come apart from its output."""

    def __init__(self, mother: Mother, *arguments: str) -> None:
        reader, writer = os.pipe()
        self.errors = os.fdopen(reader)
        with os.fdopen(writer, "w") as errors:
            super().__init__(mother, FORKED, *arguments, errors=errors)

    def finish(self) -> tuple[int, str, str]:
        """Wait for its end; its exit code, and the rest of what it wrote to standard output and standard error."""
        out, err = self.output.read(), self.errors.read()
        return self.wait(), out, err

    def end(self) -> None:
        super().end()
        self.errors.close()


def is_one_line_error(done: Finished) -> bool:
    lines = done.err.strip().splitlines()
    return (
        done.code == 2
        and done.out == ""
        and "Traceback" not in done.err
        and lines[-1].startswith("error: ")
        and all("(from the environment)" in line for line in lines[:-1])
    )


def workers_of(process: int) -> list[int]:
    """The workers that a process has started for itself and that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
                running = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except (OSError, ValueError):
                continue
            if running and b"--parent" in line and line[line.index(b"--parent") + 1] == str(process).encode():
                found.append(int(entry.name))
    return found
