"""What every server answers without any handler, so that it can be measured; and that nothing odd comes of it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from shmtransport import AsyncClient, AsyncServer, Client, LocalProtocolError, RemoteError, TensorTooLarge
from shmtransport.host import ECHO, PROBE

from .helpers import MIB, Serve, echo


def test_every_server_echoes_and_probes(serve: Serve, address: str) -> None:
    """Without any handler: a tensor comes back copied, or so many bytes in place; nothing for nothing."""
    serve()
    with Client(address, arena_bytes=MIB) as client:
        assert client.call(ECHO) is None
        for x in (torch.arange(1000.0), torch.empty(0), torch.tensor(3), torch.ones(3, 4, dtype=torch.bfloat16)):
            y = client.call(ECHO, x)
            assert torch.equal(x, y)
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            del y
        before = client.statistics().tensors_copied
        loan = client.empty((MIB // 2,), torch.uint8)
        for nbytes in (0, 1, MIB):
            found = client.call(PROBE, nbytes, loan)
            assert (found.dtype, tuple(found.shape)) == (torch.uint8, (nbytes,))
            del found
        assert client.statistics().tensors_copied == before


def test_a_probe_shows_nothing_of_another_client(serve: Serve, address: str) -> None:
    """Uninitialised bytes are the caller's own reply arena's: zero at first, then what it was sent before."""
    serve()
    with Client(address, arena_bytes=MIB) as first, Client(address, arena_bytes=MIB) as second:
        first.call(ECHO, torch.full((MIB,), 77, dtype=torch.uint8))
        assert not second.call(PROBE, MIB).any()


@pytest.mark.parametrize(
    ("arguments", "keywords", "kind"),
    [
        ((ECHO, 1), {}, LocalProtocolError),
        ((ECHO, [torch.ones(3)]), {}, LocalProtocolError),
        ((ECHO, np.ones(3)), {}, LocalProtocolError),
        ((ECHO, "x" * 1000), {}, LocalProtocolError),
        ((ECHO, None, None), {}, RemoteError),
        ((ECHO,), {"self": 1}, RemoteError),
        ((PROBE,), {}, RemoteError),
        ((PROBE, -1), {}, LocalProtocolError),
        ((PROBE, True), {}, LocalProtocolError),
        ((PROBE, 1.0), {}, LocalProtocolError),
        ((PROBE, None), {}, LocalProtocolError),
        ((PROBE, torch.tensor(5)), {}, LocalProtocolError),
        ((PROBE, [1, 2]), {}, LocalProtocolError),
        ((PROBE, MIB + 1), {}, TensorTooLarge),
        ((PROBE, 2**63 - 1), {}, TensorTooLarge),
        ((PROBE, 2**64 - 1), {}, TensorTooLarge),
        (("__init__",), {}, LocalProtocolError),
        (("__class__",), {}, LocalProtocolError),
    ],
)
def test_nonsense_arguments_are_the_callers_error(
    serve: Serve, address: str, arguments: tuple[Any, ...], keywords: dict[str, Any], kind: type[Exception]
) -> None:
    """The server serves on, and nothing stays held."""
    serve()
    with Client(address, arena_bytes=MIB) as client:
        with pytest.raises(kind):
            client.call(*arguments, **keywords)
        assert client.call(PROBE, MIB).nbytes == MIB
        assert torch.equal(client.call(ECHO, torch.ones(MIB // 4)), torch.ones(MIB // 4))


def test_such_names_can_not_be_registered_and_are_not_listed(serve: Serve, address: str) -> None:
    """They are the server's own; a wrong name is answered by the names of the user's handlers alone."""
    server = serve(echo=echo)
    for name in (ECHO, PROBE, "__anything"):
        with pytest.raises(LocalProtocolError, match="the server's own"):
            server.register(name, echo)
    with Client(address) as client, pytest.raises(LocalProtocolError, match=r"'nope'; there are: echo$"):
        client.call("nope")


def test_an_async_server_answers_them_too(address: str) -> None:
    """It can be measured as any other."""

    async def ask() -> None:
        async with AsyncServer(address) as server:
            serving = asyncio.create_task(server.serve())
            async with AsyncClient(address, arena_bytes=MIB) as client:
                assert await client.call(ECHO) is None
                assert (await client.call(PROBE, MIB)).nbytes == MIB
                assert (await client.call(ECHO, torch.arange(5))).tolist() == [0, 1, 2, 3, 4]
            server.stop()
            await serving

    asyncio.run(ask())
