"""torch.compile of a function that calls a server: a clean graph break, and the same results."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing

from shmtransport import AsyncClient, Client
from shmtransport.protocol.messages import ChannelKind


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """Forget what other tests have compiled."""
    torch._dynamo.reset()


def test_a_compiled_function_may_call_a_server(shared_server: str, channel: ChannelKind) -> None:
    """Two graphs, before and after the call; nothing of the call itself is compiled, however often it is made."""
    with Client(shared_server, channel=channel) as client:

        def around(x: torch.Tensor) -> torch.Tensor:
            doubled: torch.Tensor = client.call("double", x + 1)
            return doubled * 3

        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(around, backend=counter)
        for value in range(20):
            x = torch.full((4,), float(value))
            assert torch.equal(compiled(x), (x + 1) * 6)
        assert counter.frame_count == 2


def test_a_compiled_function_may_use_loans_and_pending_replies(shared_server: str, channel: ChannelKind) -> None:
    """Everything a client offers works."""
    with Client(shared_server, channel=channel) as client:

        def around(x: torch.Tensor) -> torch.Tensor:
            loan = client.empty(tuple(x.shape), x.dtype)
            loan.copy_(x)
            pending = client.submit("double", loan)
            result = pending.result()
            like = client.empty_like(result)
            like.copy_(result)
            return like + 0 * client.server_pid

        x = torch.arange(4.0)
        assert torch.equal(torch.compile(around, backend="eager")(x), x * 2)


def test_one_graph_of_a_function_that_calls_is_refused_with_the_reason(shared_server: str) -> None:
    """``fullgraph=True`` can't be had."""
    with Client(shared_server) as client:
        compiled = torch.compile(lambda x: client.call("double", x), backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="a call to another process can't be compiled"):
            compiled(torch.ones(2))


def test_a_compiled_function_may_call_without_blocking(shared_server: str) -> None:
    """The asyncio client likewise."""

    async def run() -> None:
        async with AsyncClient(shared_server) as client:
            x = torch.arange(4.0)
            compiled = torch.compile(lambda: client.call("double", x + 1), backend="eager")
            assert torch.equal(await compiled(), (x + 1) * 2)

    asyncio.run(run())


def test_the_compiler_is_not_imported_for_it() -> None:
    """It takes longer to import than all the rest."""
    program = "import sys, shmtransport; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
