"""``client.py ADDRESS CHANNEL SEED THREADS``: a client; runs until its input ends.

Every second it prints its counts as one line of JSON; the last line has "done". What is wrong ends it with exit code 1
and one line that says what. Errors that a killed, stopped or busy server explains are counted, all others are wrong.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter, deque
from typing import Any

import torch

from shmtransport import (
    ArenaFull,
    CallTimeout,
    Client,
    Closed,
    ConnectRefused,
    ConnectTimeout,
    MessageTooLarge,
    PeerDied,
    RemoteError,
    TensorTooLarge,
)
from tests.adversarial.soak.content import fill, is_reply_to, random_row, random_shape

ARENA_BYTES = 16 << 20
ENDED = (PeerDied, Closed, ConnectTimeout, ConnectRefused)
HELD = 6
HANGS_S = 25.0


class Soaker:
    """One client, used by several threads."""

    def __init__(self, address: str, channel: Any, seed: int) -> None:
        self.address = address
        self.chance = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.stopping = threading.Event()
        self.wrong: str | None = None
        self.reconnecting = threading.Lock()
        self.counting = threading.Lock()
        self.client = self._connect(channel)

    def _connect(self, channel: Any) -> Client:
        while True:
            try:
                return Client(self.address, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=5.0)
            except ENDED:  # noqa: PERF203 - it may start again
                if self.stopping.is_set():
                    raise

    def run(self, seed: int) -> None:
        """The body of one thread."""
        chance = random.Random(seed)
        held: deque[tuple[torch.Tensor, Any]] = deque()
        try:
            while not self.stopping.is_set():
                try:
                    self.act(chance, held)
                except ENDED as error:  # noqa: PERF203 - what must not end the loop
                    self.count(type(error).__name__)
                    self.reconnect()
                except (ArenaFull, CallTimeout) as error:
                    self.count(type(error).__name__)
                    held.clear()
        except BaseException:  # noqa: BLE001 - reported by the soak
            self.wrong = traceback.format_exc()
            self.stopping.set()

    def reconnect(self) -> None:
        """The first thread reconnects; the others use the connection that it made."""
        with self.reconnecting:
            while not self.stopping.is_set():
                try:
                    self.client.call("flip", 0, None, in_place=False)
                except ENDED:  # noqa: PERF203 - until one answers
                    try:
                        self.client.reconnect()
                    except ENDED:
                        continue
                    self.count("reconnects")
                except (ArenaFull, CallTimeout):
                    return
                else:
                    return

    def act(self, chance: random.Random, held: deque[tuple[torch.Tensor, Any]]) -> None:
        kind = chance.randrange(100)
        if kind < 60:
            self.check(self.tensors(chance, 1 + chance.randrange(3)), chance, held)
        elif kind < 85:
            self.pipeline(chance)
        elif kind < 90:
            self.expect(RemoteError, "fail", "on purpose")
        elif kind < 93:
            self.expect(MessageTooLarge, "flip", 0, "x" * 100_000, in_place=False)
        elif kind < 95:
            self.expect(TensorTooLarge, "flip", 0, torch.empty(ARENA_BYTES + 5000, dtype=torch.uint8), in_place=False)
        elif kind < 97:
            pending = self.client.submit("sleep", chance.random() * 0.2)
            try:
                pending.result(timeout_s=0.05)
            except CallTimeout:
                self.count("late replies")
        elif kind < 98:
            self.fork()
        else:
            held.clear()

    def tensors(self, chance: random.Random, count: int) -> list[torch.Tensor]:
        made = []
        for _ in range(count):
            dtype = random_row(chance)
            shape = random_shape(chance, dtype.itemsize)
            lent = chance.random() < 0.5
            made.append(fill(self.client.empty(shape, dtype) if lent else torch.empty(shape, dtype=dtype), chance))
        return made

    def check(self, tensors: list[torch.Tensor], chance: random.Random, held: deque[tuple[torch.Tensor, Any]]) -> None:
        """One call; some results are kept for a while and looked at again before they go."""
        tag = chance.randrange(1 << 40)
        reply = self.client.call("flip", tag, tensors, in_place=chance.random() < 0.5)
        self.compare(tag, tensors, reply)
        if chance.random() < 0.3:
            held.append((tensors[0].clone(), reply["value"][0]))
        if len(held) > HELD:
            sent, kept = held.popleft()
            if not is_reply_to(sent, kept):
                raise AssertionError(f"a result of {sent.dtype} {tuple(sent.shape)} has changed while it was held")

    def pipeline(self, chance: random.Random) -> None:
        """Several calls in flight, some with the same loan."""
        shared = self.tensors(chance, 1)
        calls = []
        for tag in range(1 + chance.randrange(6)):
            sent = shared if chance.random() < 0.5 else self.tensors(chance, 1)
            calls.append((tag, sent, self.client.submit("flip", tag, sent, in_place=chance.random() < 0.5)))
        for tag, sent, pending in calls:
            self.compare(tag, sent, pending.result())

    def compare(self, tag: int, tensors: list[torch.Tensor], reply: Any) -> None:
        if reply["tag"] != tag:
            raise AssertionError(f"the reply has tag {reply['tag']}, the request {tag}")
        for sent, got in zip(tensors, reply["value"], strict=True):
            if not is_reply_to(sent, got):
                raise AssertionError(f"wrong content: {sent.dtype} {tuple(sent.shape)}")
        self.count("calls")
        self.count("bytes", sum(tensor.nbytes for tensor in tensors))

    def expect(self, kind: type[Exception], method: str, *arguments: Any, **keywords: Any) -> None:
        try:
            self.client.call(method, *arguments, **keywords)
        except kind:
            self.count(kind.__name__)
        else:
            raise AssertionError(f"{method} did not raise {kind.__name__}")

    def fork(self) -> None:
        """Fork a child that tries to use the client, and drops it: that does no harm."""
        child = os.fork()
        if child == 0:
            code = 1
            faulthandler.dump_traceback_later(HANGS_S, exit=True)
            try:
                self.client.call("flip", 0, None, in_place=False)
            except Closed:
                self.client.close()
                del self.client
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status != 0:
            raise AssertionError(f"a forked child ended with status {status}")
        self.count("forks")

    def count(self, what: str, number: int = 1) -> None:
        with self.counting:
            self.counts[what] += number


def main() -> None:
    """Run until standard input ends."""
    address, channel, seed, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    soaker = Soaker(address, channel, seed)
    workers = [threading.Thread(target=soaker.run, args=(seed + number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    threading.Thread(target=lambda: (sys.stdin.read(), soaker.stopping.set()), daemon=True).start()
    while not soaker.stopping.wait(1.0):
        print(json.dumps(soaker.counts), flush=True)
    deadline = time.monotonic() + HANGS_S + 5.0
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            stack = traceback.format_stack(sys._current_frames()[worker.ident or 0])
            soaker.wrong = soaker.wrong or f"a thread hangs:\n{''.join(stack)}"
    if soaker.wrong is None:
        soaker.client.close()
    print(json.dumps({**soaker.counts, "done": True, "wrong": soaker.wrong}), flush=True)
    os._exit(0 if soaker.wrong is None else 1)


if __name__ == "__main__":
    main()
