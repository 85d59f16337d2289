"""A server with a GPU: copies between pinned arenas and the GPU, which nothing waits for that need not.

They run on a stand-in for CUDA's driver, which carries copies out late, reads their sources only then, and fills their
destinations with other bytes until then: see ``tests/support/cuda_driver``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shmtransport import CallTimeout, Client, DeviceError, LocalProtocolError, RemoteError, Server, TransportError
from shmtransport.protocol.messages import ChannelKind
from shmtransport.units import KIB, MIB
from tests.support import cuda_driver
from tests.support.children import Child, Mother
from tests.support.cuda import LATE_US, SERVER, Gpus
from tests.support.helpers import Spawn, eventually
from tests.support.left_behind import kill
from tests.support.loops import on_each_channel
from tests.support.process import ROOT, Process

SERVERS: dict[str, dict[str, Any]] = {"one thread": {}, "threads": {"threads": 3}, "asyncio": {"asynchronous": True}}
PATHS = {
    "pinned": {},
    "bounced": {"FAIL": "cuMemHostRegister=801"},
    "neither": {"FAIL": "cuMemHostRegister=2,cuMemHostAlloc=2"},
}


def client_of(address: str, channel: ChannelKind = "doorbell", **options: Any) -> Client:
    """A client whose arenas are pinned already, or known not to be."""
    client = Client(address, channel=channel, **options)
    assert eventually(lambda: "being pinned" not in client.call("facts")["path"])
    return client


def left_behind(process: Process) -> dict[str, int]:
    """What a server that is ended now has left on the GPU."""
    process.signal(signal.SIGTERM)
    *_, last = process.output.read().splitlines()
    left: dict[str, int] = json.loads(last)
    return left


@pytest.mark.parametrize("options", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("settings", PATHS.values(), ids=PATHS)
@on_each_channel
def test_tensors_reach_the_gpu_and_come_back(
    gpus: Gpus, channel: ChannelKind, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    """Every dtype and size crosses unchanged, however it gets there; a reply is sent only when all of it has."""
    gpus.start_server(settings, **options)
    with client_of(gpus.address, channel, arena_bytes=8 * MIB) as client:
        for count in (0, 1, 1000, MIB):
            for dtype in (torch.float32, torch.bfloat16, torch.bool):
                x = (torch.arange(count) % 251).to(dtype)
                back = client.call("there_and_back", x)
                assert back.dtype == dtype
                assert torch.equal(back, x)
        both = client.call("nested", torch.full((3, 4), 2.0), torch.zeros(5, dtype=torch.int8))
        assert torch.equal(both["x"][0], torch.full((3, 4), 2.0))
        assert both["y"][1] == 7
        assert [part.sum().item() for part in client.stream("parts", torch.ones(1000), 4)] == [1000] * 4


def test_a_pinned_arena_is_copied_from_and_to_directly(gpus: Gpus) -> None:
    """No copy goes through other memory, none makes its caller wait, and nothing waits for the whole device."""
    server = gpus.start_server()
    with client_of(gpus.address) as client:
        for _ in range(5):
            client.call("there_and_back", torch.ones(1000))
        assert client.call("facts") == {"path": "pinned", "pinned": 10, "bounced": 0}
        assert client.health()["device"] == "pinned"
        assert client.call("count", "pageable_copies") == client.call("count", "calls:cuStreamSynchronize") == 0
        assert client.call("count", "registered_bytes") >= 2 * client.call("echo", MIB)
    assert not any(left_behind(server).values())


def test_arenas_are_pinned_in_pieces(gpus: Gpus) -> None:
    """An arena larger than the driver registers at once is pinned all the same; tensors over the borders cross."""
    gpus.start_server({"REGISTER_LIMIT": 256 * KIB}, piece_bytes=256 * KIB)
    with client_of(gpus.address, arena_bytes=2 * MIB) as client:
        x = torch.arange(300_000, dtype=torch.int32)
        assert torch.equal(client.call("there_and_back", x), x)
        assert client.call("facts") == {"path": "pinned", "pinned": 2, "bounced": 0}
        assert client.call("count", "calls:cuMemHostRegister") == 16


def test_an_argument_is_released_behind_the_copy_that_reads_it(gpus: Gpus) -> None:
    """A client may not reuse the memory of an argument while the GPU still has to read it."""
    gpus.start_server({"DELAY_US": LATE_US})
    with client_of(gpus.address, arena_bytes=64 * KIB) as client:
        for value in (1.0, 2.0, 3.0):  # each has room only when the one before has been released
            client.call("keep", torch.full((10_000,), value))
        assert [client.call("kept_again", index).unique().tolist() for index in range(3)] == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize("options", SERVERS.values(), ids=SERVERS)
def test_others_are_served_while_a_copy_is_under_way(gpus: Gpus, options: dict[str, Any]) -> None:
    """A reply that waits for the GPU holds up no other client, and no other call of its own."""
    gpus.start_server({"DELAY_US": LATE_US}, **options)
    with client_of(gpus.address) as client, client_of(gpus.address, "zmq") as other:
        pending = client.submit("there_and_back", torch.ones(1000))
        assert (client.call("echo", 1), other.call("echo", 2)) == (1, 2)
        assert not pending.done()
        assert torch.equal(pending.result(), torch.ones(1000))


def test_memory_that_cannot_be_pinned_is_told_once(gpus: Gpus) -> None:
    """One warning gives the cause and what it costs; statistics and health show the path in use."""
    server = gpus.start_server({"FAIL": "cuMemHostRegister=801"})
    for _ in range(3):
        with client_of(gpus.address) as client:
            client.call("there_and_back", torch.ones(1000))
            facts, health = client.call("facts"), client.health()
    assert (facts["pinned"], facts["bounced"]) == (0, 6)
    assert "CUDA_ERROR_NOT_SUPPORTED" in facts["path"]
    assert health["device"] == facts["path"]
    server.signal(signal.SIGTERM)
    told = [line for line in server.output if "pinned" in line and "cuda:0" in line]
    assert len(told) == 1
    assert "buffer" in told[0]
    assert "confidential-computing" in told[0]


def test_a_failed_gpu_fails_calls_and_nothing_else(gpus: Gpus) -> None:
    """After an error that the driver does not forget, calls that need the GPU fail; others, and clients, go on."""
    server = gpus.start_server({"STICKY": "cuMemcpyDtoHAsync"})
    client, other = client_of(gpus.address), client_of(gpus.address, "zmq")
    for _ in range(2):
        with pytest.raises(RemoteError, match=r"DeviceError: .*CUDA_ERROR_ILLEGAL_ADDRESS.*restart"):
            client.call("there_and_back", torch.ones(1000))
    assert client.call("echo", 5) == other.call("echo", 5) == 5
    client.close()
    assert other.call("echo", 6) == 6
    other.close()
    server.signal(signal.SIGTERM)
    assert server.wait(10) == 0


def test_a_gpu_that_hangs_costs_its_callers_a_time_out(gpus: Gpus) -> None:
    """A copy that never ends costs its caller a time-out; others are served, and the server ends when it is told to."""
    server = gpus.start_server({"STALL": 1})
    with client_of(gpus.address, timeout_s=0.3) as client, client_of(gpus.address, "zmq") as other:
        with pytest.raises(CallTimeout):
            client.call("there_and_back", torch.ones(1000))
        assert client.call("echo", 1) == other.call("echo", 1)
    server.signal(signal.SIGTERM)
    assert server.wait(20) == 0


def test_a_client_killed_in_mid_copy_leaves_nothing_pinned(gpus: Gpus, spawn: Spawn) -> None:
    """Its arenas are taken back from the driver behind the last copy, before they are unmapped."""
    server = gpus.start_server({"DELAY_US": LATE_US})
    with client_of(gpus.address) as client:
        alone = client.call("count", "registered_bytes")
        script = ROOT / "tests/support/processes/copying_client.py"
        copying = spawn(script, gpus.address)
        assert client.call("count", "registered_bytes") > alone
        kill(copying)
        assert eventually(lambda: client.call("count", "registered_bytes") == alone)
        assert torch.equal(client.call("there_and_back", torch.ones(9)), torch.ones(9))
    assert not any(left_behind(server).values())


@pytest.mark.parametrize("options", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("method", ["unsendable", "with_too_large"])
def test_what_can_not_be_sent_gives_its_room_back_behind_the_copy(
    gpus: Gpus, method: str, options: dict[str, Any]
) -> None:
    """The block of a reply that fails is free again, but not while the GPU still writes there."""
    gpus.start_server({"DELAY_US": LATE_US}, **options)
    with client_of(gpus.address) as client:
        with pytest.raises(TransportError, match="on the server"):
            client.call(method, torch.ones(1000))
        assert client.call("held") == 1
        assert eventually(lambda: client.call("held") == 0)
        assert client.call("count", "async_copies") == 2


@pytest.mark.parametrize("options", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("method", ["there_and_back", "mixed"])
def test_what_is_given_up_gives_its_room_back_behind_the_copy(gpus: Gpus, method: str, options: dict[str, Any]) -> None:
    """All blocks of a reply whose call was given up are free again once the GPU no longer writes to one of them."""
    gpus.start_server({"DELAY_US": LATE_US}, **options)
    with client_of(gpus.address) as client:
        for wait in (True, False, False):
            pending = client.submit(method, torch.ones(1000))
            assert not wait or eventually(lambda: client.call("held") > 0)
            pending.cancel()
        assert eventually(lambda: client.call("held") == 0)


@pytest.mark.parametrize("function", ["cuEventQuery", "cuEventRecord", "cuMemcpyDtoHAsync", "cuStreamWaitEvent"])
def test_a_failure_of_the_driver_leaves_nothing_held(gpus: Gpus, function: str) -> None:
    """Whichever call fails, and when: the caller learns of it or gets its result, and the room is free again."""
    for number in range(1, 5):
        server = gpus.start_server({"FAIL": f"{function}=2@{number}"})
        with client_of(gpus.address, timeout_s=10.0) as client:
            for _ in range(4):
                with contextlib.suppress(RemoteError):
                    assert torch.equal(client.call("there_and_back", torch.ones(1000)), torch.ones(1000))
            assert client.call("echo", 5) == 5
            assert eventually(functools.partial(nothing_is_held, client))
        server.end()


def nothing_is_held(client: Client) -> bool:
    """Whether no block of the client's reply arena is in use."""
    return bool(client.call("held") == 0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({}, []), ({"fail": "cuMemHostRegister=800,cuMemPoolCreate=801"}, ["NOT_PERMITTED", "NOT_SUPPORTED"])],
    ids=["all", "nothing"],
)
def test_the_doctor_tries_what_a_gpu_can(library: Path, settings: dict[str, str], told: list[str]) -> None:
    """It pins memory and makes some that can be shared, and tells the driver's reason where that fails."""
    done = subprocess.run(
        [sys.executable, "-m", "shmtransport", "doctor", "--json"],
        env=cuda_driver.environment(library.parent, **settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    (gpu,) = found["machine"]["gpus"]
    reasons = [gpu["not_pinned"], gpu["not_shared"]]
    assert all(name in reason for name, reason in zip(told, reasons, strict=False)) if told else reasons == ["", ""]
    assert sum("cuda:0" in verdict["finding"] for verdict in found["verdicts"]) == len(told)


def test_a_gpu_that_is_not_there_is_an_error_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server says what is missing before anything listens, and which devices it takes."""
    with pytest.raises(DeviceError, match="no GPU can be used"):
        Server(address, device="cuda:0")
    for device in ("gpu", "cuda:x", "cuda:", 0, "cpu:0"):
        with pytest.raises(LocalProtocolError, match="device="):
            Server(address, device=device)  # type: ignore[arg-type]
    Server(address, device=torch.device("cpu")).close()


def test_without_a_gpu_a_tensor_stays_where_it_is(address: str, serve: Callable[..., Server]) -> None:
    """The same handler runs on a server without a GPU: its argument is used as it is."""
    server = serve(same=lambda x: server.to_device(x) is x)
    with Client(address) as client:
        assert client.call("same", torch.ones(3)) is True
        assert client.health()["device"] == "no GPU"


def test_a_gpu_beyond_those_that_are_there(mother: Mother, address: str, library: Path) -> None:
    """The error counts the GPUs that the process sees."""
    server = Child(mother, SERVER, address, str(library), '{"DEVICES": 2}', '{"ordinal": 5}')
    assert "cuda:5 is not there: this process sees 2 GPUs" in server.output.read()
    server.end()
