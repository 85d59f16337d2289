"""Clients of a process with few file descriptors: ``limited_client.py ADDRESS CHANNEL KIND LIMIT``.

It makes one client after the other and calls with each, until there is an error; then with each of them again. It
prints how many there were, and the error. KIND is "Client", "AsyncClient", or "in threads": four threads do so at once.
"""

from __future__ import annotations

import asyncio
import resource
import sys
import threading
from typing import Any

from shmtransport import AsyncClient, Client, TransportError

ENOUGH = 10


def limit_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), int(limit)))


def main() -> None:
    made = []
    try:
        while len(made) < ENOUGH:
            made.append(Client(address, **options))
            assert made[-1].call("echo", 1) == 1
    except TransportError as error:
        sys.stdout.write(f"{len(made)} {type(error).__name__}: {error}\n")
    for client in made:
        assert client.call("echo", 2) == 2
        client.close()


async def main_in_a_loop() -> None:
    limit_descriptors()
    made = []
    try:
        while len(made) < ENOUGH:
            made.append(await AsyncClient(address, **options).connect())
            assert await made[-1].call("echo", 1) == 1
    except TransportError as error:
        sys.stdout.write(f"{len(made)} {type(error).__name__}: {error}\n")
    for client in made:
        assert await client.call("echo", 2) == 2
        await client.close()


address, channel, kind, limit = sys.argv[1:]
options: dict[str, Any] = {"channel": channel, "arena_bytes": 4096, "connect_timeout_s": 20.0}
if kind == "AsyncClient":
    asyncio.run(main_in_a_loop())
else:
    limit_descriptors()
    threads = [threading.Thread(target=main) for _ in range(4 if kind == "in threads" else 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
