"""The two channels: which ones a server offers, their options, messages of all sizes, and waiting without cost."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from typing import Any

import pytest
import torch

import shmtransport.channels.relay
import shmtransport.endpoints.exchange
from shmtransport import AsyncServer, Client, ConnectRefused, LocalProtocolError, MessageTooLarge, Server
from shmtransport.protocol.messages import CHANNEL_KINDS, ChannelKind
from tests.support.helpers import KIB, MIB, Serve, Spawn, echo, eventually, in_thread, start_server

pytestmark = pytest.mark.timeout(60)

# Options


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"channel": "carrier pigeon"}, "no channel 'carrier pigeon'; there are: zmq, doorbell"),
        ({"channel": ""}, "no channel ''"),
        ({"spin_us": 10.0}, "spin_us=10: only the doorbell channel"),
        ({"channel": "doorbell", "spin_us": -1.0}, "spin_us=-1"),
    ],
    ids=["unknown", "empty", "spin with zmq", "negative spin"],
)
def test_options_that_make_no_sense_are_refused_at_once(address: str, options: dict[str, Any], reason: str) -> None:
    """A LocalProtocolError with the remedy comes before any connection is tried: there is no server here."""
    started = time.monotonic()
    with pytest.raises(LocalProtocolError, match=reason):
        Client(address, **options)
    assert time.monotonic() - started < 4.0, "no time was spent looking for a server"


def test_the_channel_really_in_use_is_told_and_logged(
    serve: Serve, address: str, channel: ChannelKind, caplog: pytest.LogCaptureFixture
) -> None:
    """The client has a property for it, and each side logs one line."""
    caplog.set_level(logging.INFO, "shmtransport")
    serve(echo=echo)
    with Client(address, channel=channel) as client:
        client.call("echo")
        assert client.channel == channel
        lines = [line for line in caplog.messages if "connected" in line]
        assert len(lines) == 2
        assert all(f"(ipc, {channel} channel)" in line for line in lines)


@pytest.mark.parametrize("server_us", [0.0, 200.0])
@pytest.mark.parametrize("client_us", [0.0, 200.0])
def test_either_side_may_look_before_it_waits(spawn: Spawn, address: str, client_us: float, server_us: float) -> None:
    """``spin_us`` on one side, on both or on none: results are the same; a client of ZeroMQ is served as well."""
    start_server(spawn, address, spin_us=server_us)
    with (
        Client(address, channel="doorbell", spin_us=client_us, timeout_s=20.0) as client,
        Client(address, timeout_s=20.0) as other,
    ):
        for i in range(200):
            x = torch.full((1 + i,), float(i))
            pending = [client.submit("double", x) for _ in range(1 + i % 3)]
            assert all(torch.equal(reply.result(), x * 2) for reply in pending)
            if i % 20 == 0:
                assert other.call("echo", i) == i
                assert client.call("sleep", 0.002) is None, "longer than it looks"


@pytest.mark.parametrize("server_prefaults", [False, True])
def test_prefault_changes_nothing_but_the_page_tables(
    spawn: Spawn, address: str, channel: ChannelKind, server_prefaults: bool
) -> None:
    """With it all pages of both arenas are mapped on connecting, on the side that asked; calls work as before."""

    def mapped_bytes(pid: int) -> int:
        """How many bytes of segments this process has entered in its page table."""
        total, ours = 0, False
        with open(f"/proc/{pid}/smaps") as smaps:
            for line in smaps:
                if "-" in line.split(" ", 1)[0]:
                    ours = "/dev/shm/shmtransport-" in line
                elif ours and line.startswith("Rss:"):
                    total += int(line.split()[1]) * KIB
        return total

    server = start_server(spawn, address, prefault=server_prefaults)
    with Client(address, channel=channel, arena_bytes=4 * MIB, reply_arena_bytes=2 * MIB, prefault=True) as client:
        assert client.call("echo", 1) == 1
        assert mapped_bytes(os.getpid()) >= 6 * MIB
        assert (mapped_bytes(server.pid) >= 6 * MIB) is server_prefaults
        for value in (1.0, 2.0):
            x = torch.full((MIB // 4,), value)
            assert torch.equal(client.call("double", x), x * 2)
    with Client(address, channel=channel, arena_bytes=4 * MIB, reply_arena_bytes=2 * MIB) as client:
        assert client.call("echo", 1) == 1
        assert mapped_bytes(os.getpid()) < 6 * MIB


# Both at one server


def test_clients_of_both_kinds_share_a_server(shared_server: str) -> None:
    """Six clients, half of them of each kind, all at once: none waits for another's kind, all contents are right."""

    def work(number: int) -> None:
        kind: ChannelKind = "doorbell" if number % 2 else "zmq"
        with Client(shared_server, channel=kind, arena_bytes=256 * KIB, timeout_s=20.0) as client:
            for i in range(100):
                x = torch.full((100 + i,), 1000.0 * number + i)
                pending = [client.submit("double", x), client.submit("echo", f"{number}/{i}")]
                assert torch.equal(pending[0].result(), x * 2)
                assert pending[1].result() == f"{number}/{i}"

    for thread in [in_thread(work, number) for number in range(6)]:
        thread.result(30.0)


def test_doorbell_clients_may_come_and_go(serve: Serve, address: str) -> None:
    """The server's bell works for any set of clients: none, one of each kind, several, in any order."""
    server = serve(echo=echo)
    for _ in range(5):
        with Client(address, arena_bytes=4 * KIB) as zmq:
            assert zmq.call("echo", 1) == 1
            with Client(address, channel="doorbell", arena_bytes=4 * KIB) as first:
                assert (first.call("echo", 2), zmq.call("echo", 3)) == (2, 3)
                with Client(address, channel="doorbell", arena_bytes=4 * KIB) as second:
                    assert (second.call("echo", 4), first.call("echo", 5)) == (4, 5)
                assert (zmq.call("echo", 6), first.call("echo", 7)) == (6, 7)
            assert zmq.call("echo", 8) == 8
    assert server.statistics().calls == 5 * 8


def test_a_client_that_floods_keeps_no_other_from_being_served(shared_server: str, channel: ChannelKind) -> None:
    """Turn by turn: with 400 calls of one client queued, another's is answered long before they all are."""
    other_kind: ChannelKind = "zmq" if channel == "doorbell" else "doorbell"
    with Client(shared_server, channel=channel) as flood, Client(shared_server, channel=other_kind) as other:
        other.call("echo")
        queued = [flood.submit("sleep", 0.005) for _ in range(400)]
        assert other.call("echo", 1) == 1
        assert flood.submit("echo", "behind them all")._call.ended is False
        assert not queued[-1]._call.ended
        flood._exchange._receive_all(flood._exchange.live())
        assert sum(reply._call.ended for reply in queued) < 200
        flood.close()


# Messages


def test_messages_of_all_sizes_pass_in_order(shared_server: str, channel: ChannelKind) -> None:
    """From nothing to the limit, so that the ends of the message rings fall everywhere into them."""
    with Client(shared_server, channel=channel, timeout_s=20.0) as client:
        sizes = [*range(64), *(997 * i % 60_000 for i in range(150)), 65_000]
        pending = []
        for number, size in enumerate(sizes):
            text = chr(65 + number % 26) * size
            pending.append((client.submit("echo", [number, text]), [number, text]))
            if len(pending) > 7:
                reply, expected = pending.pop(0)
                assert reply.result() == expected
        for reply, expected in pending:
            assert reply.result() == expected


def test_a_message_beyond_the_limit_is_refused_before_anything_is_sent(
    serve: Serve, address: str, channel: ChannelKind
) -> None:
    """The limit is the smaller of both sides' limits; what fits exactly passes; nothing stays held."""
    server = serve({"max_message_bytes": 2 * KIB}, echo=echo)
    with Client(address, channel=channel, arena_bytes=64 * KIB, timeout_s=10.0) as client:
        for _ in range(3):
            with pytest.raises(MessageTooLarge, match=r"\d+ bytes; the limit is 2048"):
                client.call("echo", [torch.ones(12 * KIB), "x" * 2100])
        assert client.statistics().control_bytes_sent == 0
        largest = max(size for size in range(1900, 2048) if _fits(client, size))
        assert largest > 2000
        assert client.call("echo", 1) == 1
        assert server.statistics().failures == 0


def _fits(client: Client, size: int) -> bool:
    try:
        return bool(client.call("echo", "x" * size) == "x" * size)
    except MessageTooLarge:
        return False


@pytest.fixture
def no_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off the periodic look, so that a forgotten ring makes the test fail."""
    for module, name in (
        (shmtransport.endpoints.exchange, "_SEND_SLICE_S"),
        (shmtransport.endpoints.exchange, "_WATCH_SLICE_S"),
        (shmtransport.channels.relay, "SLICE_S"),
    ):
        monkeypatch.setattr(module, name, 50.0)


@pytest.mark.usefixtures("no_looking")
def test_room_in_a_message_ring_is_told_at_once(serve: Serve, address: str) -> None:
    """The reader of a ring wakes the writer: for room to ask, and for room to answer."""
    go_on = threading.Event()
    server = serve(wait=lambda: go_on.wait(10.0), echo=echo, long=lambda number: chr(97 + number) * 900)
    with Client(address, channel="doorbell", timeout_s=50.0, max_message_bytes=1024) as client:
        client.submit("wait")
        texts = [chr(97 + number) * 900 for number in range(20)]
        sending = in_thread(lambda: [client.submit("echo", text) for text in texts])
        assert eventually(lambda: client.statistics().stalls == 1)
        go_on.set()
        assert [reply.result(timeout_s=5.0) for reply in sending.result(5.0)] == texts
        pending = [client.submit("long", number) for number in range(20)]
        assert eventually(lambda: server.statistics().calls == 41), "all are answered; for most there is no room"
        assert [reply.result(timeout_s=5.0) for reply in pending] == texts


@pytest.mark.usefixtures("no_looking")
def test_room_is_told_when_a_request_is_read_not_when_it_is_answered(
    serve: Serve, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow handler doesn't block senders: reading its request has already made room."""
    go_on = [threading.Event(), threading.Event()]
    server = serve(wait=lambda number, _text="": go_on[number].wait(10.0), echo=echo)
    with Client(address, channel="doorbell", timeout_s=50.0, max_message_bytes=1024) as client:
        receive = server._receive

        def late_receive() -> Any:
            time.sleep(0.05)  # so that the answer to the one before is seen first
            return receive()

        monkeypatch.setattr(server, "_receive", late_receive)
        waiting = [client.submit("wait", 0)]
        time.sleep(0.2)
        waiting += [client.submit("wait", 1, "x" * 900), client.submit("echo", "x" * 900)]
        sending = in_thread(client.submit, "echo", "y" * 900)
        assert eventually(lambda: client.statistics().stalls == 1)
        go_on[0].set()
        last = sending.result(5.0)
        assert not waiting[1]._call.ended
        go_on[1].set()
        assert last.result(timeout_s=5.0) == "y" * 900


# Waiting


def _cpu_seconds(pid: int) -> float:
    """How much processor time a process has used, over all its threads."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _waits(pid: int) -> int:
    """How often a process's threads have begun to wait for something."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/status") as status:
            total += sum(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))
    return total


def test_an_idle_connection_uses_no_processor(spawn: Spawn, address: str) -> None:
    """A server, a client connected by either channel, and one that waits for a reply: none of them polls."""
    server = start_server(spawn, address)
    with Client(address, channel="doorbell") as client, Client(address) as other:
        assert (client.call("echo", 1), other.call("echo", 2)) == (1, 2)
        waits = _waits(server.pid)  # this process has other tests' servers, too
        server_s, own_s = _cpu_seconds(server.pid), time.process_time()
        assert client.call("sleep", 0.7) is None
        time.sleep(0.8)
        server_s, own_s = _cpu_seconds(server.pid) - server_s, time.process_time() - own_s
        waits = _waits(server.pid) - waits
    assert max(server_s, own_s) < 0.1
    assert waits < 60, "it wakes up again and again"


def test_an_idle_server_that_looks_before_it_waits_does_wait(spawn: Spawn, address: str) -> None:
    """``spin_us`` bounds the spinning: after it the server uses no processor time either."""
    server = start_server(spawn, address, spin_us=1000.0)
    with Client(address, channel="doorbell", spin_us=1000.0) as client:
        client.call("echo")
        before = _cpu_seconds(server.pid)
        time.sleep(1.0)
        assert _cpu_seconds(server.pid) - before < 0.1


def test_a_server_in_a_thread_stops_with_clients_of_both_kinds(address: str) -> None:
    """``stop`` wakes it wherever it waits, again and again."""
    for _ in range(5):
        with Server(address) as server:
            server.register("echo", echo)
            serving = in_thread(server.serve)
            with Client(address, channel="doorbell") as client, Client(address) as other:
                assert (client.call("echo", 1), other.call("echo", 2)) == (1, 2)
                server.stop()
                serving.result(5.0)


def _bells() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(f"sem.shmtransport-bell-{os.getpid()}-")}


@pytest.mark.parametrize("offered", CHANNEL_KINDS)
@pytest.mark.parametrize("asked", CHANNEL_KINDS)
def test_a_channel_that_is_not_offered_is_refused_by_name(
    serve: Serve, address: str, offered: ChannelKind, asked: ChannelKind
) -> None:
    """Both are named; nothing was made for the refused client, and the next one is served."""
    others = _bells()
    serve({"channels": (offered,)}, echo=echo)
    if asked == offered:
        with Client(address, channel=asked) as client:
            assert client.call("echo", 1) == 1
        return
    with pytest.raises(
        ConnectRefused, match=f"channel {asked} was asked for; its channels are {offered}: use {offered}"
    ):
        Client(address, channel=asked)
    assert _bells() <= others
    with Client(address, channel=offered) as client:
        assert client.call("echo", 1) == 1


def test_an_asyncio_server_chooses_too(address: str) -> None:
    """The same option, the same words."""

    async def main() -> None:
        async with AsyncServer(address, channels=["zmq"]) as server:
            serving = asyncio.create_task(server.serve())
            with pytest.raises(ConnectRefused, match="channel doorbell was asked for; its channels are zmq"):
                await asyncio.to_thread(Client, address, channel="doorbell")
            server.stop()
            await serving

    asyncio.run(main())


def test_both_are_offered_by_default(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Naming both changes nothing, in any order, nor does naming one twice."""
    serve({"channels": ["doorbell", "zmq", "zmq"]}, echo=echo)
    with Client(address, channel=channel) as client:
        assert client.call("echo", 1) == 1
    assert Server.__init__.__kwdefaults__["channels"] == CHANNEL_KINDS
