"""Worker processes that are killed and started again."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_split import SplitLlamaForCausalLM
from tests.support.children import Child, Mother
from tests.support.process import ROOT

SCRIPT = ROOT / "tests/support/processes/worker.py"


class Workers:
    """Workers at one address, one after another, each a process that is there at once."""

    def __init__(self, mother: Mother, model: Path, address: str, layers: str | None = None) -> None:
        self.address = address
        self.pid = 0
        reader, writer = os.pipe()
        self._said = os.fdopen(writer, "w")
        with os.fdopen(reader) as said:
            self._loaded = Child(mother, SCRIPT, str(model), address, *([layers] if layers else []), said=said)
        assert self._loaded.readline() == "loaded"

    def start(self) -> None:
        """Start the next one, and wait until it serves."""
        self._said.write("next\n")
        self._said.flush()
        self.pid = int(self._loaded.readline())

    def kill(self) -> None:
        """Kill the one that runs, and wait until it is gone, so that the next one finds its address free."""
        descriptor = os.pidfd_open(self.pid)
        try:
            os.kill(self.pid, signal.SIGKILL)
            assert select.select([descriptor], [], [], 10.0)[0]
        finally:
            os.close(descriptor)

    def stop(self) -> None:
        self._said.close()
        assert self._loaded.wait() == 0
        self._loaded.end()


def killing(split: SplitLlamaForCausalLM, kill: Callable[[], None], every: int, worker: int = 0) -> list[int]:
    """Have ``kill`` called just before each ``every``-th call of an operation begins; the list grows with each.

    Of several workers, the calls of the one with this index count.
    """
    kills: list[int] = []
    calls = 0
    client = split.workers[worker].client
    submit = client.submit

    def counted(method: str, *arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        if method not in ("describe", "end_session"):
            calls += 1
            if calls % every == 0:
                kill()
                kills.append(calls)
        return submit(method, *arguments, **keywords)

    client.submit = counted  # type: ignore[method-assign]
    return kills
