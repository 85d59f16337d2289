"""Arenas on a GPU that client and server both use: tensors stay there, and no stream waits for the other side's.

Both run on a stand-in for CUDA's driver, see ``tests/support/cuda_driver``; tests look at its memory through numpy.
"""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
import torch

from shmtransport import Client, LocalProtocolError
from tests.support.cuda import LATE_US, Gpus
from tests.support.helpers import eventually
from tests.support.left_behind import kill


def test_tensors_of_every_kind_cross(gpus: Gpus) -> None:
    """Sizes and dtypes cross unchanged in both directions, beside tensors in ordinary memory."""
    gpus.start_server()
    assert gpus.client("echoed") == [[[1], True]] * 18


def test_loans_are_not_copied(gpus: Gpus) -> None:
    """What ``empty`` lends on the GPU, on either side, crosses without any copy."""
    gpus.start_server()
    assert gpus.client("in_place") == ["CudaTensor", [9], 0, 0]


@pytest.mark.parametrize("settings", [{}, {"DELAY_US": LATE_US}], ids=["soon", "late"])
def test_the_peer_is_told_when_the_gpu_has_completed_a_tensor(gpus: Gpus, settings: dict[str, Any]) -> None:
    """What is told to the other side is there, however long the GPU takes to make it."""
    gpus.start_server(settings)
    assert gpus.client("path", settings) == ["on the GPU", "CudaTensor", [5], ["CudaTensor", [9]]]
    assert gpus.client("in_place", settings)[1] == [9]


def test_a_block_is_used_again_behind_what_was_begun_with_it(gpus: Gpus) -> None:
    """A tensor that dies while the GPU has yet to read it keeps its memory until then, on the other side too."""
    gpus.start_server({"DELAY_US": LATE_US})
    assert gpus.client("one_block") == [[1], [2], [3]]


def test_nothing_stays_held(gpus: Gpus) -> None:
    """Once the results are gone, so are the borrows here and the blocks at both ends."""
    gpus.start_server()
    assert gpus.client("nothing_held") == [20, 0, 0]


def test_what_has_no_room_on_the_gpu_goes_through_the_segments(gpus: Gpus) -> None:
    """A tensor beyond the room of the arena on the GPU arrives all the same, in ordinary memory."""
    gpus.start_server()
    assert gpus.client("without_room") == ["CudaTensor", "Tensor", [2]]


def test_a_result_outlives_its_client(gpus: Gpus) -> None:
    """A borrowed tensor stays valid when the client is closed and gone."""
    gpus.start_server()
    assert gpus.client("outliving") == [4]


@pytest.mark.parametrize(
    ("of_server", "of_client", "why"),
    [
        ({"UUID": "0" * 31 + "1"}, {"UUID": "0" * 31 + "2"}, "another GPU"),
        ({"FAIL": "cuMemPoolCreate=801"}, {}, "NOT_SUPPORTED"),
        ({}, {"FAIL": "cuMemPoolCreate=801"}, "NOT_SUPPORTED"),
        ({}, {"FAIL": "cuMemPoolImportFromShareableHandle=1"}, "INVALID"),
        ({"FAIL": "cuMemPoolImportFromShareableHandle=1"}, {}, "INVALID"),
    ],
    ids=["another GPU", "not at the server", "not at the client", "not to be opened there", "not to be opened here"],
)
def test_where_a_gpu_cannot_be_shared_the_reason_is_told(
    gpus: Gpus, of_server: dict[str, Any], of_client: dict[str, Any], why: str
) -> None:
    """It is found when the client connects, told with its cause, and the pinned arenas are used."""
    gpus.start_server(of_server)
    told, kind, content, made = gpus.client("path", of_client)
    assert told.startswith("not on the GPU: ")
    assert why in told
    assert (kind, content, made) == ("Tensor", [5], ["Tensor", [9]])


def test_a_server_without_a_gpu_takes_tensors_in_ordinary_memory(gpus: Gpus) -> None:
    """A client with a GPU can call any server."""
    gpus.start_server(device=None)
    told, kind, content, *_ = gpus.client("no_gpu")
    assert "the server has no GPU" in told
    assert (kind, content) == ("Tensor", [5])


def test_a_client_without_a_gpu_has_no_tensors_on_it(gpus: Gpus) -> None:
    """It is told so, before anything is sent."""
    gpus.start_server()
    with Client(gpus.address) as client:
        assert client.device_path == "no GPU"
        with pytest.raises(LocalProtocolError, match="cuda:0 was asked for, and this side uses no GPU"):
            client.empty((3,), torch.uint8, device="cuda:0")
        assert client.empty((3,), torch.uint8, device="cpu").is_cpu


def test_a_range_beyond_the_peers_own_memory_costs_it_the_connection(gpus: Gpus) -> None:
    """A descriptor is checked against the size that was agreed; other clients go on."""
    gpus.start_server()
    with Client(gpus.address) as other:
        assert "PeerDied" in gpus.client("beyond")
        assert other.call("echo", 1) == 1


def test_memory_is_shared_once_and_only_with_its_owner(gpus: Gpus) -> None:
    """A second attempt is refused, and what the first has set up stays in use."""
    gpus.start_server()
    assert "once" in gpus.client("again")


def test_a_gpu_that_hangs_costs_a_time_out(gpus: Gpus) -> None:
    """A client whose GPU never completes an argument gets an error in time."""
    gpus.start_server()
    assert gpus.client("stalled", {"STALL": 1}).startswith("CallTimeout: ")


def test_a_killed_client_leaves_no_memory_on_the_gpu(gpus: Gpus) -> None:
    """The server gives up what it opened of the client's, and what it made for it."""
    gpus.start_server()
    with Client(gpus.address) as client:
        before = [client.call("count", name) for name in ("device_bytes", "imported_bytes")]
        holding = gpus.start_client("wait")
        assert holding.readline() == "holding"
        assert client.call("count", "imported_bytes") > before[1]
        kill(holding)
        client.call("forget")
        assert eventually(lambda: [client.call("count", name) for name in ("device_bytes", "imported_bytes")] == before)


def test_a_killed_server_ends_calls_and_leaves_results(gpus: Gpus) -> None:
    """Calls fail at once; a result that lies in the server's memory stays valid."""
    server = gpus.start_server()
    client = gpus.start_client("died")
    assert client.readline() == "holding"
    kill(server)
    assert json.loads(client.readline()) == ["PeerDied", [4]]


def test_a_gpu_that_fails_costs_a_connection_and_not_the_server(gpus: Gpus) -> None:
    """An argument on the GPU that can't be borrowed ends its client's connection; others go on."""
    gpus.start_server({"STICKY": "cuMemcpyHtoDAsync"})
    with Client(gpus.address) as other:
        sharing = gpus.start_client("after_a_failure")
        *_, last = sharing.output.read().splitlines()
        assert json.loads(last).startswith("PeerDied: the server ended the connection: cuCtxPushCurrent failed")
        assert other.call("echo", 1) == 1


def test_a_process_ends_in_order_while_its_memory_is_in_use(gpus: Gpus) -> None:
    """A server that stops while a client holds a result on the GPU, and a client that leaves without closing."""
    server = gpus.start_server()
    client = gpus.start_client("died")
    assert client.readline() == "holding"
    server.signal(signal.SIGTERM)
    assert server.wait(20) == 0
    assert json.loads(client.readline())[1] == [4]
    assert client.wait(20) == 0


def test_a_result_is_released_after_its_client_is_gone(gpus: Gpus) -> None:
    """Also if a garbage collection came between: the server's memory is free again."""
    gpus.start_server()
    with Client(gpus.address) as client:
        before = client.call("count", "device_bytes")
        outliving = gpus.start_client("released_late")
        assert outliving.readline() == "holding"
        assert client.call("count", "device_bytes") > before
        assert outliving.readline() == "released"
        assert eventually(lambda: client.call("count", "device_bytes") == before)


def test_memory_of_clients_that_have_gone_counts(gpus: Gpus) -> None:
    """A client that connects, keeps a result and closes, again and again, is refused memory beyond ``max_clients``."""
    gpus.start_server(max_clients=3)
    paths = gpus.client("keeping")
    assert paths[:3] == ["on the GPU"] * 3
    assert all("3 clients, also such that have gone, hold" in path for path in paths[3:])


def test_a_forked_child_releases_nothing(gpus: Gpus) -> None:
    """A result that dies in a child is still the parent's."""
    gpus.start_server()
    assert gpus.client("forking") == [0, [4]]


def test_more_results_than_slots_go_through_the_segments(gpus: Gpus) -> None:
    """The 1025th tensor that is held arrives in ordinary memory."""
    gpus.start_server()
    assert gpus.client("many") == [1024, 6]
