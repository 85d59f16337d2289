"""Running the command line, and judging what it did."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

LLAMA = [sys.executable, "-m", "llama_split"]


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
        [*LLAMA, *arguments], env=environment(**extra), capture_output=True, text=True, timeout=120, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


Command = Callable[..., Finished]


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
