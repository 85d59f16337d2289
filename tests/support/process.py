"""Python child processes of a test, and what a killed one leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]


class Process:
    """A Python child process that prints "ready" once it is."""

    def __init__(self, script: str | Path, *arguments: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(),
        )

    @staticmethod
    def environment() -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def output(self) -> IO[str]:
        """What it prints, errors too."""
        assert self.popen.stdout is not None
        return self.popen.stdout

    def wait_until_ready(self) -> None:
        line = self.output.readline()
        assert line.startswith("ready"), f"the process said {line!r}, not ready"

    def readline(self) -> str:
        return self.output.readline().rstrip("\n")

    def wait(self, timeout_s: float = 30.0) -> int:
        return self.popen.wait(timeout_s)

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def stop(self) -> None:
        """Have it stopped (SIGSTOP), and wait until it is."""
        self.signal(signal.SIGSTOP)
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self.output.close()
