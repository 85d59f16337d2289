"""A client that forks: ``forking_client.py ADDRESS CHANNEL WHAT``; prints "ready", then what came of it, line by line.

Each function below is one WHAT. A child ends by ``os._exit(0)`` unless something else is said, and by a signal if it
hangs.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from shmtransport import Client, Closed

address, channel, what = sys.argv[1:4]
ARENA_BYTES = 64 << 10


def say(*words: Any) -> None:
    print(*words, flush=True)


def connect() -> Client:
    return Client(address, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=20.0)


def in_child(work: Callable[[], object]) -> int:
    """Run a function in a forked child; the child's exit code."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def say_error(name: str, use: Callable[[], object]) -> None:
    """What a use of the client comes to: the error's class, and whether it names the fork."""
    try:
        use()
    except Exception as error:  # noqa: BLE001
        say(name, type(error).__name__, "forked" in str(error))
    else:
        say(name, "nothing")


def use_in_child(client: Client) -> None:
    """Every use, in a child, of a client with a call in flight; then the parent goes on."""
    x = client.empty((16,), torch.float32).fill_(1.0)
    pending = client.submit("total", x, 0.3)

    def use() -> None:
        say_error("call", lambda: client.call("echo", 1))
        say_error("submit", lambda: client.submit("echo", 1))
        say_error("empty", lambda: client.empty((1,), torch.uint8))
        say_error("empty_like", lambda: client.empty_like(x))
        say_error("server_pid", lambda: client.server_pid)
        say_error("result", pending.result)
        say_error("close", client.close)
        say_error("close again", client.close)

    say(in_child(use))
    say(pending.result(), client.call("echo", 1))


def drop_in_child(client: Client) -> None:
    """A child drops what its parent has borrowed and lent; then the parent fills both arenas again and again."""
    results = [client.call("fill", 2 << 10, 7.0), client.call("echo", torch.full((1 << 10,), 8.0))]
    client.call("keep", client.empty((1 << 10,), torch.float32).fill_(9.0))
    loan = client.empty((1 << 10,), torch.float32).fill_(5.0)
    everything: list[Any] = [*results, loan]
    del loan, results

    def drop() -> None:
        everything.clear()
        gc.collect()

    say(in_child(drop))
    wrong = 0
    for i in range(100):
        x = torch.full((3 << 10,), float(i))
        wrong += not torch.equal(client.call("double", x), x * 2)
        wrong += not torch.equal(client.call("fill", 3 << 10, float(i)), x)
    held = [tensor.unique().tolist() for tensor in everything]
    say(wrong, held, set(client.call("look", 0)))


def exit_in_order(_inherited: list[Any]) -> None:
    sys.exit(0)


def exit_at_once(_inherited: list[Any]) -> None:
    os._exit(0)


def exit_by_an_error(_inherited: list[Any]) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the traceback
    raise RuntimeError("the child's own")


def exit_from_a_with_block(inherited: list[Any]) -> None:
    with inherited[0]:
        sys.exit(0)


def exit_after_collecting(inherited: list[Any]) -> None:
    inherited.clear()
    globals().pop("client")
    gc.collect()
    sys.exit(0)


def exit_in_every_way(client: Client) -> None:
    """Children end with all that they have inherited; the parent's calls in flight and later ones arrive."""
    for end in (exit_in_order, exit_at_once, exit_by_an_error, exit_from_a_with_block, exit_after_collecting):
        inherited = [client, client.call("fill", 16, 3.0), client.empty((16,), torch.float32)]
        pending = client.submit("sleep", 0.05)
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            del client
            end(inherited)
        _, status = os.waitpid(child, 0)
        pending.result()
        with connect() as other:
            again = other.call("fill", 16, 5.0).sum().item()
        say(end.__name__, os.waitstatus_to_exitcode(status), client.call("fill", 16, 4.0).sum().item(), again)
        say(inherited[1].sum().item())
    client.call("sleep", 0.5)  # longer than a slice of waiting, after which the connection's end would be seen
    say(client.call("fill", 16, 6.0).sum().item())


def fork_while_locked(client: Client) -> None:
    """Another thread is in the midst of everything: it holds the client's lock, or waits for a reply."""
    locked, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with client._exchange.lock:
            locked.set()
            go_on.wait(10.0)

    holder = threading.Thread(target=hold)
    waiter = threading.Thread(target=lambda: say("thread", client.call("total", torch.ones(4), 0.3)))
    waiter.start()
    holder.start()
    locked.wait(10.0)
    code = in_child(lambda: (say_error("call", lambda: client.call("echo")), say_error("close", client.close)))
    go_on.set()
    holder.join()
    say(code)
    waiter.join()
    say(client.call("echo", 1))


def connect_in_child(client: Client) -> None:
    """A child makes a client of its own; or takes its parent's, reconnects it, and forks a child itself."""
    result = client.call("fill", 16, 3.0)

    def make() -> None:
        with connect() as own:
            say("its own", own.call("fill", 16, 1.0).sum().item())

    def take() -> None:
        client.reconnect()
        held = client.call("fill", 16, 2.0)
        say("reconnected", held.sum().item())
        say("grandchild", in_child(lambda: say_error("call", lambda: client.call("echo"))))
        say("reconnected", client.call("echo", 1), held.sum().item())
        client.close()

    say(in_child(make), in_child(take))
    say(client.call("echo", 1), result.sum().item())


def work_of_spawned() -> None:
    """In a process that ``multiprocessing`` has spawned."""
    for kind in ("zmq", "doorbell"):
        with Client(address, channel=kind) as own:
            say(kind, own.call("double", torch.ones(4)).tolist())


def spawn_child(client: Client) -> None:
    """A spawned child inherits nothing, and makes clients of its own."""
    process = multiprocessing.get_context("spawn").Process(target=work_of_spawned)
    process.start()
    process.join(60)
    say(process.exitcode, client.call("echo", 1))


def fork_a_closed_one(client: Client) -> None:
    """The error in the child says that the client was closed before; it doesn't blame the fork."""
    client.close()

    def use() -> None:
        try:
            client.call("echo")
        except Closed as error:
            say("closed", "forked" in str(error))

    say(in_child(use))


if __name__ == "__main__":
    with connect() as client:
        say("ready")
        globals()[what](client)
