"""``python -m tests.adversarial.soak --minutes M [--seed N]``: many servers and clients, some killed, all checked.

Exit code 1, with the seed and what was wrong, if any content, error or figure is not what it must be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from llama_split.placement.local import temporary_directory
from shmtransport.memory.leftovers import list_all, remove_dead
from tests.support import children

SILENCE_LIMIT_S = 40.0
SETTLING_S = 20.0  # imports and first use take memory once
GROWTH_LIMIT_KIB = 96 << 10
DESCRIPTOR_LIMIT = 40
CALLS = ("calls", "RemoteError", "MessageTooLarge", "TensorTooLarge", "late replies", "forks")
HAPPENS = (*CALLS, "clients killed", "clients stopped for a while")
HAPPENS_WITHIN_S = 60.0


class Child(children.Child):
    """A process of the soak; its last line of JSON is ``counts``."""

    def __init__(self, mother: children.Mother, script: str, *arguments: str) -> None:
        self.script = script
        reader, writer = os.pipe()
        self._input = os.fdopen(writer, "w")
        with os.fdopen(reader) as said:
            super().__init__(mother, Path(__file__).with_name(script), *arguments, said=said, errors=sys.stderr)
        self.counts: dict[str, Any] = {}
        self.started = self.heard = time.monotonic()
        self.first: tuple[int, int] | None = None
        self.last = (0, 0)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.output:
            self.heard = time.monotonic()
            with contextlib.suppress(ValueError):
                self.counts = json.loads(line)

    def look(self) -> None:
        """Note what the process takes: anonymous memory in KiB, file descriptors."""
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.pid}/status").read_text()
            memory = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
            self.last = (memory, len(os.listdir(f"/proc/{self.pid}/fd")))
            if self.first is None and time.monotonic() - self.started > SETTLING_S:
                self.first = self.last

    def code(self, timeout_s: float = 0.0) -> int | None:
        """Its exit code, if it ends in this time."""
        try:
            return self.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def finish(self, timeout_s: float) -> int:
        """Ask a client to end; its exit code."""
        self._input.close()
        code = self.code(timeout_s)
        if code is None:
            self.kill()
            return -1
        self._reader.join(5.0)
        return code


class Soak:
    """Two servers, steady clients on both channels at each, and others that connect and are killed."""

    def __init__(self, mother: children.Mother, directory: str, seed: int) -> None:
        self._mother = mother
        self.chance = random.Random(seed)
        self.addresses = {kind: f"ipc://{directory}/{kind}.ipc" for kind in ("blocking", "async")}
        self.servers = {kind: self._server(kind) for kind in self.addresses}
        self.steady = [self._client(kind, channel, 3) for kind in self.addresses for channel in ("zmq", "doorbell")]
        self.victims: list[Child] = []
        self.events: Counter[str] = Counter()
        self.wrong: list[str] = []

    def _server(self, kind: str) -> Child:
        return Child(self._mother, "server.py", self.addresses[kind], kind)

    def _client(self, kind: str, channel: str, threads: int) -> Child:
        seed = self.chance.randrange(1 << 30)
        return Child(self._mother, "client.py", self.addresses[kind], channel, str(seed), str(threads))

    def run(self, seconds: float) -> None:
        """Run everything, and now and then kill a process or stop it for a while; go on until all has happened."""
        end = time.monotonic() + seconds
        last_report = time.monotonic()
        while not self.wrong and (time.monotonic() < end or self._has_yet_to_happen()):
            if time.monotonic() > end + HAPPENS_WITHIN_S:
                self.wrong.append(f"never happened: {self._has_yet_to_happen()}")
            time.sleep(self.chance.uniform(0.2, 1.0))
            self._disturb()
            for child in (*self.steady, *self.servers.values()):
                child.look()
            self._watch()
            if time.monotonic() - last_report > 10:
                last_report = time.monotonic()
                print(self.summary(), flush=True)

    def _has_yet_to_happen(self) -> list[str]:
        """What no soak is too short for: calls of each kind and by each steady client, a killed and a stopped one."""
        idle = [f"calls by process {client.pid}" for client in self.steady if not client.counts.get("calls")]
        total = self._total()
        return idle + [what for what in HAPPENS if not total[what]]

    def _disturb(self) -> None:
        kind, channel = self.chance.choice(list(self.addresses)), self.chance.choice(["zmq", "doorbell"])
        what = self.chance.randrange(20)
        if len(self.victims) < 3:
            self.victims.append(self._client(kind, channel, 2))
        elif what < 6:
            victim = self.victims.pop(self.chance.randrange(len(self.victims)))
            victim.kill()
            self.events["clients killed"] += 1
        elif what < 9:
            self._pause(self.chance.choice(self.victims))
            self.events["clients stopped for a while"] += 1
        elif what == 9:
            self._pause(self.servers[kind])
            self.events["servers stopped for a while"] += 1
        elif what == 10:
            self.servers[kind].kill()
            self.servers[kind] = self._server(kind)
            self.events["servers killed"] += 1

    def _pause(self, child: Child) -> None:
        child.signal(signal.SIGSTOP)
        time.sleep(self.chance.uniform(0.05, 1.5))
        child.signal(signal.SIGCONT)
        child.heard = time.monotonic()

    def _watch(self) -> None:
        for client in (*self.steady, *self.victims):
            if client.code() is not None:
                self.wrong.append(f"a client ended: {client.counts.get('wrong')}")
            elif time.monotonic() - client.heard > SILENCE_LIMIT_S:
                self.wrong.append(f"process {client.pid} says nothing for {SILENCE_LIMIT_S:g} s: it hangs")
        for kind, server in self.servers.items():
            if (code := server.code()) is not None:
                self.wrong.append(f"the {kind} server ended with code {code}")

    def finish(self) -> None:
        """End all in order, and check what they leave behind."""
        for client in (*self.victims, *self.steady):
            code = client.finish(60.0)
            if code != 0:
                self.wrong.append(f"a client ended with code {code}: {client.counts.get('wrong')}")
        for child in (*self.steady, *self.servers.values()):
            first, (memory, descriptors) = child.first or child.last, child.last
            if memory - first[0] > GROWTH_LIMIT_KIB:
                self.wrong.append(f"{child.script} grew from {first[0]} to {memory} KiB")
            if descriptors - first[1] > DESCRIPTOR_LIMIT:
                self.wrong.append(f"{child.script} had {first[1]} descriptors, then {descriptors}")
        own = {str(server.pid) for server in self.servers.values()}
        for kind, server in self.servers.items():
            server.signal(signal.SIGTERM)
            if (code := server.code(30.0)) != 0:
                self.wrong.append(f"the {kind} server ended with code {code}")
        left = [one.name for one in list_all() if any(pid in one.name for pid in own)]
        # What was killed between making a segment and its removal leaves a name, until the next server sweeps it away.
        self.events["names that killed processes left"] = len(remove_dead())
        left += [one.name for one in list_all() if one.dead]
        if left:
            self.wrong.append(f"left in /dev/shm: {left}")

    def end_at_once(self) -> None:
        for child in (*self.victims, *self.steady, *self.servers.values()):
            child.kill()

    def _total(self) -> Counter[str]:
        total = Counter(self.events)
        for client in (*self.steady, *self.victims):
            total.update({key: value for key, value in client.counts.items() if type(value) is int})
        return total

    def summary(self) -> str:
        memory = max(child.last[0] for child in (*self.steady, *self.servers.values()))
        figures = {**self._total(), "largest process (KiB, anonymous)": memory}
        return ", ".join(f"{key} {value}" for key, value in figures.items())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-", dir=temporary_directory(room=64)) as directory:
        mother = children.Mother.start(environment={**children.Process.environment(), "OMP_NUM_THREADS": "1"})
        soak = Soak(mother, directory, arguments.seed)
        try:
            soak.run(arguments.minutes * 60)
            soak.finish()
        finally:
            soak.end_at_once()
            mother.end()
    print(soak.summary())
    for wrong in soak.wrong:
        print(f"WRONG (seed {arguments.seed}): {wrong}")
    sys.exit(1 if soak.wrong else 0)


if __name__ == "__main__":
    main()
