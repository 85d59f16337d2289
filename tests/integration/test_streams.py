"""Streaming calls of the blocking client: their parts, how they end, and what they leave to others."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shmtransport import ArenaFull, CallTimeout, Client, Closed, LocalProtocolError, PeerDied, RemoteError, Server
from shmtransport.protocol.messages import ChannelKind
from shmtransport.units import KIB, MIB
from tests.support.helpers import DeliberateError, Serve, Spawn, echo, eventually, in_thread
from tests.support.left_behind import kill
from tests.support.process import ROOT

pytestmark = pytest.mark.timeout(60)

CLIENT = ROOT / "tests/support/processes/streaming_client.py"
SERVER = ROOT / "tests/support/processes/streaming_server.py"
ARENA_BYTES = 64 * KIB
READ_AHEAD = 8  # unless a call says otherwise
A_WHILE_S = 0.05  # what has not happened by then is not about to


@pytest.fixture(params=[1, 3], ids=["one thread", "threads"])
def threads(request: pytest.FixtureRequest) -> int:
    """A server that handles calls in its own thread, and one that has several for them."""
    count: int = request.param
    return count


@pytest.fixture(params=["Server", "threads", "AsyncServer"])
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of server, in a process of its own."""
    name: str = request.param
    return name


class Endless:
    """A generator without an end: how many parts it has made, and how many of its calls have begun and ended."""

    def __init__(self) -> None:
        self.made = self.begun = self.ended = 0

    def __call__(self) -> Iterator[int]:
        self.begun += 1
        try:
            while True:
                self.made += 1
                yield self.made
        finally:
            self.ended += 1

    def is_over(self) -> bool:
        """Whether a call of it has begun, and none is in progress."""
        return self.begun == self.ended > 0


def count(parts: int) -> Iterator[int]:
    yield from range(parts)


def fail_after(parts: int) -> Iterator[int]:
    yield from range(parts)
    raise DeliberateError("after the last part")


def serve_tensors(serve: Serve, threads: int) -> Server:
    """A server whose ``tensors(parts, size)`` yields tensors of ``size`` bytes in the reply arena."""
    server = serve(options={"threads": threads}, echo=echo)

    def tensors(parts: int, size: int) -> Iterator[torch.Tensor]:
        for value in range(parts):
            yield server.empty((size,), torch.uint8).fill_(value % 256)

    server.register("tensors", tensors)
    server.register("fill", lambda size: server.empty((size,), torch.uint8).fill_(1))
    return server


def is_free(client: Client) -> bool:
    """Whether a result as large as the reply arena has room."""
    return bool((client.call("fill", ARENA_BYTES) == 1).all())


# Parts


def test_all_parts_come_in_order_and_then_the_end(spawn: Spawn, address: str, channel: ChannelKind, kind: str) -> None:
    """From each kind of server; afterwards the stream stays at its end, and the connection is as before."""
    spawn(SERVER, address, kind)
    ends: list[int] = []
    for parts in (0, 1, READ_AHEAD, READ_AHEAD + 1, 1000):
        with Client(address, channel=channel) as client:
            stream = client.stream("count", parts)
            assert list(stream) == list(range(parts))
            assert list(stream) == []
            assert client.call("ends") == [*ends, parts]
            assert list(client.stream("count", parts=3)) == [0, 1, 2]
            ends += [parts, 3]


def test_an_async_generator_answers_a_blocking_client(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """What the server is made of makes no difference to its clients."""
    spawn(SERVER, address, "AsyncServer")
    with Client(address, channel=channel) as client:
        assert list(client.stream("count_in_the_loop", 100)) == list(range(100))
        with client.stream("count_in_the_loop", 1 << 40) as stream:
            assert next(stream) == 0
        assert eventually(lambda: client.call("ends") == [100, 1 << 40])


def test_any_iterator_may_be_the_parts(serve: Serve, address: str, channel: ChannelKind, threads: int) -> None:
    """One that is no generator has nothing to be closed."""
    serve(options={"threads": threads}, squares=lambda: iter([x * x for x in range(20)]))
    with Client(address, channel=channel) as client:
        assert list(client.stream("squares")) == [x * x for x in range(20)]
        with client.stream("squares") as stream:
            assert next(stream) == 0
        assert list(client.stream("squares"))[-1] == 361


def test_each_part_runs_as_the_callers_call(serve: Serve, address: str, channel: ChannelKind, threads: int) -> None:
    """``connection_id`` and ``empty`` belong to the stream's client in every part of it."""
    server = serve(options={"threads": threads})

    def who() -> Iterator[tuple[int, torch.Tensor]]:
        for value in range(20):
            yield server.connection_id, server.empty((1,), torch.int64).fill_(value)

    server.register("who", who)
    with Client(address, channel=channel) as one, Client(address, channel=channel) as other:
        for value, (mine, its) in enumerate(zip(one.stream("who"), other.stream("who"), strict=True)):
            assert (mine[0], its[0]) == (1, 2)
            assert (mine[1].item(), its[1].item()) == (value, value)
    assert server.statistics().tensors_copied == 0


# Read-ahead


@pytest.mark.parametrize("read_ahead", [None, 1, 2, 3, 1024])
def test_the_server_is_no_further_ahead_than_allowed(
    serve: Serve, address: str, channel: ChannelKind, threads: int, read_ahead: int | None
) -> None:
    """Neither before the first part is taken nor later; and it does go as far as that at first."""
    endless = Endless()
    serve(options={"threads": threads}, endless=endless)
    with Client(address, channel=channel) as client:
        caller = client if read_ahead is None else client.with_options(read_ahead=read_ahead)
        ahead = READ_AHEAD if read_ahead is None else read_ahead
        with caller.stream("endless") as stream:
            assert eventually(lambda: endless.made == ahead)
            time.sleep(A_WHILE_S)
            assert endless.made == ahead
            for taken in range(1, 2 * ahead + 10):
                assert next(stream) == taken
                assert endless.made <= taken + ahead
            assert eventually(lambda: endless.made >= taken + (ahead + 1) // 2)
            time.sleep(A_WHILE_S)
            assert endless.made <= taken + ahead


@pytest.mark.parametrize("read_ahead", [0, -1, 1025, 1.5, True, "8", None])
def test_a_read_ahead_beyond_its_limits_is_refused(
    serve: Serve, address: str, channel: ChannelKind, read_ahead: Any
) -> None:
    """It is 1 to 1024; the error names the option."""
    serve()
    with Client(address, channel=channel) as client, pytest.raises(LocalProtocolError, match="read_ahead"):
        client.with_options(read_ahead=read_ahead)


# Early ends


def _close(stream: Any) -> None:
    stream.close()
    stream.close()


def _leave(stream: Any) -> None:
    with stream:
        pass


def _fail_in_it(stream: Any) -> None:
    with pytest.raises(DeliberateError), stream:
        raise DeliberateError


@pytest.mark.parametrize("end", [_close, _leave, _fail_in_it])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_closed_stream_ends_its_generator(
    serve: Serve, address: str, channel: ChannelKind, threads: int, end: Callable[[Any], None], taken: int
) -> None:
    """Its ``finally`` runs at the server; no part comes any more, and the connection is as before."""
    endless = Endless()
    server = serve(options={"threads": threads}, endless=endless, echo=echo)
    with Client(address, channel=channel) as client:
        stream = client.stream("endless")
        assert [next(stream) for _ in range(taken)] == list(range(1, taken + 1))
        assert eventually(lambda: endless.begun == 1)
        end(stream)
        assert list(stream) == []
        assert eventually(endless.is_over)
        made = endless.made
        assert client.call("echo", 1) == 1
        assert endless.made == made
    assert server.statistics().failures == 0


def test_a_dropped_stream_ends_its_generator(serve: Serve, address: str, channel: ChannelKind, threads: int) -> None:
    """As a generator that is dropped, for example by leaving a loop early."""
    endless = Endless()
    serve(options={"threads": threads}, endless=endless, echo=echo)
    with Client(address, channel=channel) as client:
        for part in client.stream("endless"):
            if part == 20:
                break
        assert eventually(endless.is_over)
        assert client.call("echo", 1) == 1


def test_a_stream_that_is_closed_before_it_begins_does_no_harm(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """Many streams are opened and closed at once; none is left, and none ends another one."""
    endless = Endless()
    serve(options={"threads": threads}, endless=endless, count=count)
    with Client(address, channel=channel) as client:
        kept = client.stream("count", 100)
        for _ in range(100):
            client.stream("endless").close()
        assert list(kept) == list(range(100))
        assert eventually(lambda: endless.begun == endless.ended)


def test_what_the_end_of_a_closed_generator_raises_is_logged(
    serve: Serve, address: str, channel: ChannelKind, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    """No call is there any more that could raise it; it counts as a failure, and the connection is as before."""

    def clumsy() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            raise DeliberateError("while closing")

    server = serve(options={"threads": threads}, clumsy=clumsy, echo=echo)
    with Client(address, channel=channel) as client:
        with client.with_options(read_ahead=1).stream("clumsy") as stream:
            assert next(stream) == 1
        assert eventually(lambda: server.statistics().failures == 1)
        assert client.call("echo", 1) == 1
    assert "while closing" in caplog.text


def test_a_generator_that_will_not_end_is_left_behind(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """One that yields although it is closed: the error is counted, and others are served."""

    def stubborn() -> Iterator[int]:
        try:
            yield from range(1, 100)
        except GeneratorExit:
            yield 100

    server = serve(options={"threads": threads}, stubborn=stubborn, echo=echo)
    with Client(address, channel=channel) as client:
        with client.stream("stubborn") as stream:
            assert next(stream) == 1
        assert eventually(lambda: server.statistics().failures == 1)
        assert client.call("echo", 1) == 1


# Errors


def test_an_error_comes_after_the_parts_before_it(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """It is raised once, and then the stream is over; it is counted, and the connection is as before."""
    server = serve(options={"threads": threads}, fail_after=fail_after)
    with Client(address, channel=channel) as client:
        for parts in (0, 3, 50):
            stream = client.stream("fail_after", parts)
            assert [next(stream) for _ in range(parts)] == list(range(parts))
            with pytest.raises(RemoteError, match="DeliberateError: after the last part"):
                next(stream)
            assert list(stream) == []
        assert client.statistics().failures == 3
    assert server.statistics().failures == 3


def test_a_part_that_can_not_be_sent_ends_the_stream(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """The parts before it come first, then the error of that part; the generator's ``finally`` runs."""
    ended = threading.Event()

    def parts() -> Iterator[object]:
        try:
            yield 1
            yield object()
            yield 3
        finally:
            ended.set()

    serve(options={"threads": threads}, parts=parts, echo=echo)
    with Client(address, channel=channel) as client:
        stream = client.stream("parts")
        assert next(stream) == 1
        with pytest.raises(LocalProtocolError, match="object"):
            next(stream)
        assert list(stream) == []
        assert ended.wait(10.0)
        assert client.call("echo", 1) == 1


def test_the_wrong_kind_of_call_is_the_callers_error(
    spawn: Spawn, address: str, channel: ChannelKind, kind: str
) -> None:
    """``call`` of a generator, ``stream`` of anything else, and a stream of what is not there."""
    spawn(SERVER, address, kind)
    with Client(address, channel=channel) as client:
        with pytest.raises(LocalProtocolError, match="generator"):
            client.call("count", 3)
        with pytest.raises(LocalProtocolError, match=r"'echo' returned a list.*use call\(\)"):
            next(client.stream("echo", [1, 2]))
        with pytest.raises(LocalProtocolError, match="no such"):
            next(client.stream("no such"))
        assert list(client.stream("count", 3)) == [0, 1, 2]


def test_a_part_that_does_not_come_in_time_leaves_the_stream_open(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """The time is for each part; once it comes, it is the next."""
    may_go_on = threading.Event()

    def slow() -> Iterator[int]:
        yield 1
        may_go_on.wait(30.0)
        yield 2
        yield 3

    serve(options={"threads": threads}, slow=slow)
    with Client(address, channel=channel) as client:
        stream = client.with_options(timeout_s=0.1).stream("slow")
        assert eventually(lambda: _next_in_time(stream) == 1)
        with pytest.raises(CallTimeout, match=r"'slow' within 0\.1 s"):
            next(stream)
        with pytest.raises(CallTimeout):
            next(stream)
        may_go_on.set()
        assert eventually(lambda: _next_in_time(stream) == 2)
        assert list(stream) == [3]


def _next_in_time(stream: Iterator[int]) -> int | None:
    try:
        return next(stream)
    except CallTimeout:
        return None


# The end of a client or of a server


def test_a_client_that_is_closed_ends_its_generators(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """The stream then raises what every call of that client does; the generators' ``finally`` run."""
    endless = Endless()
    serve(options={"threads": threads}, endless=endless, count=count)
    with Client(address, channel=channel) as client:
        streams = [client.stream("endless") for _ in range(3)]
        assert [next(stream) for stream in streams]
        assert eventually(lambda: endless.begun == 3)
    assert eventually(endless.is_over)
    for stream in streams:
        with pytest.raises(Closed):
            list(stream)
        assert list(stream) == []
    with pytest.raises(Closed):
        client.stream("count", 3)


def test_a_client_that_reconnects_ends_its_generators(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """An old stream says nothing over the new connection, whose calls have the same numbers."""
    endless = Endless()
    serve(options={"threads": threads}, endless=endless, count=count)
    with Client(address, channel=channel) as client:
        old = client.stream("endless")
        assert next(old) == 1
        client.reconnect()
        assert eventually(endless.is_over)
        new = client.stream("count", 100)
        assert next(new) == 0
        old.close()
        del old
        assert list(new) == list(range(1, 100))


def test_a_killed_client_ends_its_generators(
    serve: Serve, spawn: Spawn, address: str, channel: ChannelKind, threads: int
) -> None:
    """Its process is gone without a word; the generator's ``finally`` runs all the same."""
    endless = Endless()
    serve(options={"threads": threads}, endless=endless)
    client = spawn(CLIENT, address, channel, "stream")
    assert endless.begun == 1
    kill(client)
    assert eventually(endless.is_over)


BRIEF = """
import runpy
import sys
from shmtransport import AsyncServer, Server

for one in (Server, AsyncServer):
    one.__init__.__kwdefaults__["drain_timeout_s"] = 0.3
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_server_that_ends_ends_its_streams(
    spawn: Spawn, address: str, directory: Path, channel: ChannelKind, kind: str, how: str
) -> None:
    """The parts that it sent come first, then PeerDied; it is one that takes little time to end."""
    brief = directory / "brief.py"
    brief.write_text(BRIEF)
    server = spawn(brief, str(SERVER), address, kind)
    with Client(address, channel=channel) as client:
        stream = client.stream("count", 1 << 40)
        assert next(stream) == 0
        assert client.call("echo", 1) == 1
        kill(server) if how == "kill" else server.signal(15)
        rest: list[int] = []
        with pytest.raises(PeerDied):
            rest.extend(stream)
        assert rest == list(range(1, len(rest) + 1))
        if how == "stop":
            assert list(server.output)[-1] == "stopped\n"


def test_a_server_that_is_closed_ends_its_generators(address: str, channel: ChannelKind, threads: int) -> None:
    """Their ``finally`` run before ``close`` returns, or soon after."""
    endless = Endless()
    server = Server(address, threads=threads)
    server.register("endless", endless)
    serving = in_thread(server.serve)
    with Client(address, channel=channel) as client:
        streams = [client.stream("endless") for _ in range(20)]
        assert [next(stream) for stream in streams]
        server.stop()
        serving.result(30.0)
        server.close()
        assert eventually(endless.is_over)
        for stream in streams:
            with pytest.raises(PeerDied):
                list(stream)


def test_sys_exit_in_a_generator_ends_the_server(address: str, channel: ChannelKind, threads: int) -> None:
    """As in any handler: ``serve`` raises it, and the stream ends with PeerDied."""

    def leave() -> Iterator[int]:
        yield 1
        raise SystemExit(3)

    server = Server(address, threads=threads)
    server.register("leave", leave)
    serving = in_thread(server.serve)
    with Client(address, channel=channel) as client:
        stream = client.stream("leave")
        assert isinstance(serving.exception(30.0), SystemExit)
        server.close()
        with pytest.raises(PeerDied):
            assert list(stream) == [1]


# Tensors


def test_parts_with_tensors_pass_through_a_small_arena(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """Many times as much as it holds; each part is right, and none is copied."""
    server = serve_tensors(serve, threads)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        for value, part in enumerate(client.stream("tensors", 200, 4 * KIB)):
            assert part.numel() == 4 * KIB
            assert bool((part == value % 256).all())
        del part
        assert server.statistics().tensors_copied == 0
        assert is_free(client)


def test_a_part_that_is_kept_stays_as_it_is(serve: Serve, address: str, channel: ChannelKind, threads: int) -> None:
    """Its room is not used again while it lives, whatever comes after it."""
    serve_tensors(serve, threads)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        kept = []
        for value, part in enumerate(client.stream("tensors", 100, 2 * KIB)):
            if value % 25 == 0:
                kept.append(part)
        del part
        assert [bool((part == 25 * index).all()) for index, part in enumerate(kept)] == [True] * 4
        kept.clear()
        assert is_free(client)


def test_more_than_fits_is_made_only_as_parts_are_released(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """Parts of 24 KiB with an arena of 64 KiB: the third waits for room, and other calls don't wait for it."""
    serve_tensors(serve, threads)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        stream = client.stream("tensors", 20, 24 * KIB)
        held = [next(stream), next(stream)]
        assert client.call("echo", 1) == 1
        with Client(address, channel=channel) as other:
            assert list(other.stream("tensors", 2, 8))[1].tolist() == [1] * 8
        rest = 0
        for value in range(2, 20):
            assert bool((held.pop(0) == value - 2).all())
            held.append(next(stream))
            rest += 1
        assert rest == 18
        assert next(stream, None) is None
        held.clear()
        assert is_free(client)


def test_parts_that_are_not_taken_are_released(serve: Serve, address: str, channel: ChannelKind, threads: int) -> None:
    """By a close and by a drop: those that had arrived, and those on their way."""
    serve_tensors(serve, threads)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        for end in ("close", "drop", "leave") * 5:
            stream = client.stream("tensors", 1000, 2 * KIB)
            if end == "leave":
                with stream:
                    assert next(stream)[0] == 0
            elif end == "close":
                stream.close()
            del stream
            assert is_free(client)


def test_arguments_are_kept_as_long_as_the_generator(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """Borrowed while it may use them, released when it has ended."""

    def rows(x: torch.Tensor) -> Iterator[torch.Tensor]:
        yield from x

    server = serve(options={"threads": threads}, rows=rows, size=lambda x: x.numel())
    whole = torch.arange(ARENA_BYTES // 8).reshape(64, -1)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=30.0) as client:
        brief = client.with_options(timeout_s=0.05)
        with client.stream("rows", whole) as stream:
            assert torch.equal(next(stream), whole[0])
            with pytest.raises(ArenaFull):
                brief.call("size", whole)
        assert client.call("size", whole) == whole.numel()
        for row, part in enumerate(client.stream("rows", whole)):
            assert torch.equal(part, whole[row])
        del part
        assert client.call("size", whole) == whole.numel()
    assert server.statistics().failures == 0


def test_snapshots_of_parts_are_private(serve: Serve, address: str, channel: ChannelKind, threads: int) -> None:
    """They hold no room, so all of them may be kept."""
    serve_tensors(serve, threads)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES, snapshot=True) as client:
        parts = list(client.stream("tensors", 50, 8 * KIB))
        assert [bool((part == value).all()) for value, part in enumerate(parts)] == [True] * 50


# Several at once


def test_streams_and_calls_are_interleaved_on_one_connection(
    spawn: Spawn, address: str, channel: ChannelKind, kind: str
) -> None:
    """Each stream has its own parts, in order, however slowly the others are taken."""
    spawn(SERVER, address, kind)
    with Client(address, channel=channel, arena_bytes=MIB) as client:
        streams = [client.stream("count", 40 * number) for number in range(1, 6)]
        tensors = client.stream("tensors", 60, 3000)
        seen: list[list[int]] = [[] for _ in streams]
        for turn in range(200):
            assert client.call("echo", turn) == turn
            for number, stream in enumerate(streams):
                if turn % (number + 1) == 0:
                    seen[number] += [part for part in [next(stream, None)] if part is not None]
            part = next(tensors, None)
            assert turn >= 60 if part is None else bool((part == turn).all())
        for number, stream in enumerate(streams, 1):
            assert seen[number - 1] + list(stream) == list(range(40 * number))


def test_a_stream_that_nobody_reads_holds_up_no_one(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """Not its own client's calls and streams, and not another client's."""
    endless = Endless()
    serve(options={"threads": threads}, endless=endless, echo=echo, count=count)
    with Client(address, channel=channel) as client, Client(address, channel=channel) as other:
        unread = [client.stream("endless") for _ in range(20)]
        for one in (client, other):
            assert list(one.stream("count", 50)) == list(range(50))
            assert one.call("echo", 1) == 1
        assert eventually(lambda: endless.made == 20 * READ_AHEAD)
        del unread


def test_each_thread_may_have_a_stream_of_its_own(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """Threads that share a client: whichever receives, every part reaches its own stream."""
    server = serve_tensors(serve, threads)
    server.register("count", count)
    with Client(address, channel=channel, arena_bytes=MIB) as client:

        def work(number: int) -> bool:
            right = list(client.stream("count", 100 + number)) == list(range(100 + number))
            parts = enumerate(client.stream("tensors", 50, 1000))
            return right and all(bool((part == value).all()) for value, part in parts)

        working = [in_thread(work, number) for number in range(6)]
        assert all(one.result(50.0) for one in working)


def test_another_thread_may_close_a_stream_that_is_waited_for(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """The waiting thread is told at once."""
    may_go_on = threading.Event()

    def slow() -> Iterator[int]:
        yield 1
        may_go_on.wait(30.0)

    serve(options={"threads": threads}, slow=slow)
    with Client(address, channel=channel) as client:
        stream = client.stream("slow")
        assert next(stream) == 1
        waiting = in_thread(next, stream, None)
        time.sleep(A_WHILE_S)
        stream.close()
        with pytest.raises(Exception, match="the stream of 'slow' was closed"):
            waiting.result(10.0)
        may_go_on.set()


def test_a_stream_shows_what_it_is(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Its method, and whether it is open."""
    serve(count=count, fail_after=fail_after)
    with Client(address, channel=channel) as client:
        stream = client.stream("count", 2)
        assert stream.method == "count"
        assert repr(stream).startswith("<ReplyStream 'count': ")
        with client.with_options(read_ahead=1).stream("count", 20) as open_one:
            assert repr(open_one) == "<ReplyStream 'count': open>"
        assert repr(open_one) == "<ReplyStream 'count': ended>"
        assert list(stream) == [0, 1]
        assert repr(stream) == "<ReplyStream 'count': ended>"


def test_an_ended_stream_leaves_nothing_in_the_server(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """Whichever way it ends: its generator is gone without a garbage collection."""
    alive: set[int] = set()

    class Token:
        def __init__(self) -> None:
            alive.add(id(self))

        def __del__(self) -> None:
            alive.discard(id(self))

    def parts(how_many: int) -> Iterator[int]:
        token = Token()
        yield from range(how_many)
        if token and how_many == 13:
            raise DeliberateError

    serve(options={"threads": threads}, parts=parts)
    gc.disable()
    try:
        with Client(address, channel=channel) as client:
            assert list(client.stream("parts", 20)) == list(range(20))
            assert eventually(lambda: not alive), "at its end"
            with pytest.raises(RemoteError):
                list(client.stream("parts", 13))
            assert eventually(lambda: not alive), "by an error"
            with client.stream("parts", 1000) as stream:
                assert next(stream) == 0
            assert eventually(lambda: not alive), "by a close"
            left = client.stream("parts", 1000)
            assert next(left) == 0
        assert eventually(lambda: not alive), "by the client's end"
    finally:
        gc.enable()
