"""From a lying server a client gets an error of this package, and nothing worse: no hang and no crash."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from shmtransport import CHANNEL_KINDS, Client
from shmtransport.endpoints import client_connection
from shmtransport.endpoints.reply_stream import READ_AHEAD
from shmtransport.errors import (
    ArenaFull,
    CallTimeout,
    ConnectRefused,
    ConnectTimeout,
    PeerDied,
    PeerProtocolError,
    RemoteError,
    SegmentError,
    TransportError,
)
from shmtransport.protocol.messages import (
    ChannelKind,
    Failure,
    Goodbye,
    Message,
    OneWayRequest,
    Part,
    Reply,
    Request,
    StreamRequest,
    encode,
)

from .lies import (
    ARENA_BYTES,
    RING_LIES,
    TENSOR,
    WELCOMES,
    WRONG_PARTS,
    WRONG_REPLIES,
    echoed,
    forge_releases,
    lie_in_turn,
    offers,
    parted,
    parts_in_turn,
    read_too_much,
    remove_made,
    replied,
    wrong_parts,
    wrong_replies,
)
from .servers import Guest, Lie, LyingServer

pytestmark = pytest.mark.timeout(60)

SHORT_S = 0.2
"""The timeout of what must time out."""
LONG_S = 20.0
"""The timeout of all else."""
LATE_S = 10.0
"""In less than this, a client that waited for neither has noticed a lie, even on a slow machine."""
X = torch.arange(100, dtype=torch.uint8)


@pytest.fixture(params=CHANNEL_KINDS)
def channel(request: pytest.FixtureRequest) -> ChannelKind:
    kind: ChannelKind = request.param
    return kind


@pytest.fixture(autouse=True)
def server_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a wrong handshake a client looks whether the server has just ended; none here does, so not for long."""
    monkeypatch.setattr(client_connection, "_END_SHOWS_S", 0.01)


@pytest.fixture(autouse=True)
def keeps_nothing() -> Iterator[None]:
    """Check that a client leaves no file descriptors or threads after a lie."""
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    remove_made()
    gc.collect()  # the tracebacks of the errors keep their frames' objects alive
    deadline = time.monotonic() + LONG_S
    while (after := (len(os.listdir("/proc/self/fd")), threading.active_count())) > before:
        assert time.monotonic() < deadline, f"{after} descriptors and threads; {before} before"
        time.sleep(0.02)


def connect(
    address: str, channel: ChannelKind, *, timeout_s: float = LONG_S, connect_timeout_s: float = LONG_S
) -> Client:
    return Client(
        address, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s
    )


def flood_of(message: Message) -> Lie:
    """Send this again and again, without end."""
    noise = encode(message)

    def flood(guest: Guest) -> None:
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            guest.say(noise)

    return Lie("flood", meanwhile=flood)


def assert_lied_to(address: str, channel: ChannelKind, errors: tuple[type[Exception], ...]) -> None:
    """Check that the client raises one of these errors in time, in one line that names no segment."""
    timeout_s = SHORT_S if CallTimeout in errors else LONG_S
    connect_timeout_s = SHORT_S if ConnectTimeout in errors else LONG_S
    started = time.monotonic()
    with (
        pytest.raises(errors) as caught,
        connect(address, channel, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s) as client,
    ):
        client.call("echo", X)
    assert time.monotonic() - started < LATE_S
    assert isinstance(caught.value, TransportError)
    assert "/shmtransport-" not in str(caught.value)


# --- the handshake ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "answer", "errors"), [pytest.param(*one, id=one[0]) for one in offers()])
def test_a_wrong_offer(
    address: str, channel: ChannelKind, what: str, answer: object, errors: tuple[type[Exception], ...]
) -> None:
    """Whatever answers a Hello, the client reports what is wrong with it, and has allocated nothing."""
    before = {name for name in os.listdir("/dev/shm") if str(os.getpid()) in name}
    with LyingServer(address, Lie(what, offer=lambda _hello: answer)):  # type: ignore[arg-type, return-value]
        assert_lied_to(address, channel, errors)
    assert {name for name in os.listdir("/dev/shm") if str(os.getpid()) in name} <= before


WRONG_WELCOME = (PeerProtocolError, SegmentError, PeerDied, ConnectRefused)


@pytest.mark.parametrize("what", WELCOMES)
def test_a_wrong_welcome(address: str, channel: ChannelKind, what: str) -> None:
    """False segments, another's, of the wrong size; messages out of place; silence."""
    silent = what == "nothing"
    with LyingServer(address, Lie(what, welcome=WELCOMES[what])):
        assert_lied_to(address, channel, (ConnectTimeout,) if silent else WRONG_WELCOME)


# --- replies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRONG_REPLIES)
def test_wrong_replies(address: str, channel: ChannelKind, kind: str) -> None:
    """Each ends the connection with PeerProtocolError, and does no other harm to the client."""
    count = len(wrong_replies(Request(0, "echo", [], {}, ()))[kind])
    with LyingServer(address, Lie(kind, answer=lie_in_turn(kind))):
        for _ in range(count):
            assert_lied_to(address, channel, (PeerProtocolError,))


@pytest.mark.parametrize("lie", RING_LIES, ids=str)
def test_a_forged_message_ring(address: str, lie: Lie) -> None:
    """Impossible positions and lengths raise PeerProtocolError; a ring that the server has ended raises PeerDied."""
    with LyingServer(address, lie):
        assert_lied_to(address, "doorbell", lie.errors)


def test_a_server_that_claims_to_have_read_too_much(address: str) -> None:
    """The client notices when its ring is full, and raises PeerProtocolError."""
    with LyingServer(address, Lie("read too much", meanwhile=read_too_much)):
        client = connect(address, "doorbell")
        with pytest.raises(PeerProtocolError, match="has read 1099511627776 bytes"):
            [client.submit("echo", "x" * 30_000) for _ in range(100)]
        client.close()


def test_a_message_longer_than_agreed_by_zeromq_never_arrives(address: str) -> None:
    """ZeroMQ ends that connection: the server is there and never answers."""
    lie = Lie("too long", answer=lambda guest, request: guest.say(replied(request, "x" * 70_000)))
    with LyingServer(address, lie):
        assert_lied_to(address, "zmq", (CallTimeout,))


def test_silence_is_a_timeout(address: str, channel: ChannelKind) -> None:
    """The next call times out too: the connection is still there."""
    with LyingServer(address, Lie("silent")), connect(address, channel, timeout_s=SHORT_S) as client:
        for _ in range(2):
            with pytest.raises(CallTimeout):
                client.call("echo", X)


@pytest.mark.parametrize("when", ["at once", "after a reply", "with calls in flight"])
def test_a_goodbye_at_any_moment(address: str, channel: ChannelKind, when: str) -> None:
    """All calls in flight and all that follow are PeerDied; replies that came before it count."""

    def answer(guest: Guest, request: Request) -> None:
        if when == "after a reply":
            guest.say(echoed(guest, request))
        if when != "with calls in flight" or request.call_id == 2:
            guest.say(Goodbye("enough\x1b[2J\n" * 100))

    with LyingServer(address, Lie(when, answer=answer)), connect(address, channel) as client:
        pending = [client.submit("echo", X) for _ in range(3 if when == "with calls in flight" else 1)]
        if when == "after a reply":
            assert torch.equal(pending.pop().result(), X)
        for reply in pending:
            with pytest.raises(PeerDied):
                reply.result()
        with pytest.raises(PeerDied):
            client.call("echo", X)


@pytest.mark.parametrize("kind", ["handler", "", "PeerDied", "PeerProtocolError", "Closed", "SystemExit", "os.system"])
def test_a_failure_of_any_kind_is_one_of_ours(address: str, channel: ChannelKind, kind: str) -> None:
    """The server can't choose which error the client raises: RemoteError, and the connection stays."""
    failure = lambda guest, request: guest.say(Failure(request.call_id, kind, "KeyboardInterrupt", "now"))  # noqa: E731
    with LyingServer(address, Lie(kind, answer=failure)), connect(address, channel) as client:
        for _ in range(3):
            with pytest.raises(RemoteError, match="KeyboardInterrupt: now"):
                client.call("echo", X)


# --- parts of streams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRONG_PARTS)
def test_wrong_parts(address: str, channel: ChannelKind, kind: str) -> None:
    """Each ends the connection with PeerProtocolError; the part that came before it counts."""
    count = len(wrong_parts(StreamRequest(0, "count", [], {}, (), 8))[kind])
    with LyingServer(address, Lie(kind, answer=parts_in_turn(kind))):
        for _ in range(count):
            with connect(address, channel) as client:
                stream = client.stream("count")
                assert next(stream) == "good"
                with pytest.raises(PeerProtocolError):
                    next(stream)


def test_more_parts_than_were_asked_for(address: str, channel: ChannelKind) -> None:
    """A server that is further ahead than it may be is stopped there: it can't fill the client's memory."""

    def answer(guest: Guest, request: Request | StreamRequest) -> None:
        if isinstance(request, Request):
            guest.say(echoed(guest, request))
            return
        for number in range(request.window + 1):
            guest.say(Part(request.call_id, number, ()))

    with LyingServer(address, Lie("too many", answer=answer)), connect(address, channel) as client:
        stream = client.stream("count")
        with pytest.raises(PeerProtocolError, match=f"more parts of 'count' than the {READ_AHEAD} it may"):
            client.call("echo", X)  # its reply comes after all of them
        assert [next(stream) for _ in range(READ_AHEAD)] == list(range(READ_AHEAD))
        with pytest.raises(PeerProtocolError):
            next(stream)


def test_a_part_of_a_call_that_is_no_stream(address: str, channel: ChannelKind) -> None:
    """It ends the connection."""
    part = lambda guest, request: guest.say(Part(request.call_id, 1, ()))  # noqa: E731
    with LyingServer(address, Lie("part", answer=part)):
        assert_lied_to(address, channel, (PeerProtocolError,))


def test_answers_to_a_one_way_call(address: str, channel: ChannelKind) -> None:
    """A Reply, a Failure or a Part for it is ignored, and its tensors are released: the next calls are right."""

    def answer(guest: Guest, request: Request | OneWayRequest) -> None:
        if isinstance(request, Request):
            guest.say(echoed(guest, request))
            return
        for message in (Reply(request.call_id, 1, ()), Failure(request.call_id, "handler", "X", "x")):
            guest.say(message)
        guest.say(parted(request, TENSOR, [0, [8], "uint8", 60, 1000 + request.call_id]))

    with LyingServer(address, Lie("answers", answer=answer)), connect(address, channel) as client:
        for turn in range(20):
            client.send("echo", turn)
            assert torch.equal(client.call("echo", X + turn), X + turn)


def test_parts_before_and_after_their_stream(address: str, channel: ChannelKind) -> None:
    """Parts of unknown streams, and of one that has ended or was closed, change nothing; nor does a second end."""

    def answer(guest: Guest, request: StreamRequest | Request) -> None:
        call_id = request.call_id
        if isinstance(request, Request):
            guest.say(echoed(guest, request))
            return
        for unknown in (call_id + 1000, (1 << 63) - 1):
            guest.say(Part(unknown, "forged", ()))
        for message in (Part(call_id, 1, ()), Reply(call_id, "the end", ()), Part(call_id, 2, ())):
            guest.say(message)
        for _ in range(50):
            guest.say(parted(request, "late", [0, [8], "uint8", 60, 1000 + call_id]))
        guest.say(Failure(call_id, "handler", "X", "late"))

    with LyingServer(address, Lie("late", answer=answer)), connect(address, channel) as client:
        for turn in range(10):
            stream = client.stream("count")
            if turn % 2:
                assert list(stream) == [1]
            stream.close()
            assert torch.equal(client.call("echo", X + turn), X + turn)


@pytest.mark.parametrize("end", [Failure(0, "Closed", "SystemExit", "now"), Goodbye("enough"), Reply(0, [TENSOR], ())])
def test_the_end_of_a_stream_is_one_of_ours(address: str, channel: ChannelKind, end: Message) -> None:
    """The parts before count; then the error is this package's, or the stream is over and its result is refused."""

    def answer(guest: Guest, request: StreamRequest) -> None:
        guest.say(Part(request.call_id, 1, ()))
        guest.say(end)

    errors = {Failure: RemoteError, Goodbye: PeerDied, Reply: PeerProtocolError}
    with LyingServer(address, Lie("end", answer=answer)), connect(address, channel) as client:
        stream = client.stream("count")
        assert next(stream) == 1
        with pytest.raises(errors[type(end)]):
            next(stream)
        assert list(stream) == []


def test_a_stream_that_stands_still(address: str, channel: ChannelKind) -> None:
    """The client waits for its part no longer than it was told to, again and again."""
    first = lambda guest, request: guest.say(Part(request.call_id, 1, ()))  # noqa: E731
    with LyingServer(address, Lie("still", answer=first)), connect(address, channel) as client:
        stream = client.stream("count")
        assert next(stream) == 1
        stream._timeout_s = SHORT_S
        for _ in range(2):
            with pytest.raises(CallTimeout):
                next(stream)
        stream.close()


def test_a_flood_of_parts_that_nobody_waits_for(address: str, channel: ChannelKind) -> None:
    """With nothing but the flood, the stream's next part times out: the client doesn't read forever."""
    flood = flood_of(Part(1 << 40, "x", ()))
    with LyingServer(address, flood), connect(address, channel, timeout_s=SHORT_S) as client:
        stream = client.stream("count")
        with pytest.raises(CallTimeout):
            next(stream)


# --- what a server may do, and no good one does -----------------------------------------------------------------------


def test_replies_that_nobody_waits_for_change_nothing(address: str, channel: ChannelKind) -> None:
    """Unknown call ids, each reply twice, replies of earlier calls again: every call has its own right result."""

    def answer(guest: Guest, request: Request) -> None:
        for call_id in (request.call_id + 1000, (1 << 63) - 1):
            guest.say(Reply(call_id, "forged", ()))
            guest.say(Failure(call_id, "handler", "X", "forged"))
        good = echoed(guest, request)
        guest.say(good)
        guest.say(good)
        guest.say(Reply(max(request.call_id - 1, 0), "late", ()))

    with LyingServer(address, Lie("replays", answer=answer)), connect(address, channel) as client:
        for turn in range(30):
            assert torch.equal(client.call("echo", X + turn), X + turn)


def test_a_flood_of_replies_that_nobody_waits_for(address: str, channel: ChannelKind) -> None:
    """With nothing but the flood the call times out, on time: the client doesn't read forever."""
    flood = flood_of(Failure(1 << 40, "handler", "X", "x"))
    with LyingServer(address, flood), connect(address, channel, timeout_s=SHORT_S) as client:
        started = time.monotonic()
        with pytest.raises(CallTimeout):
            client.call("echo", X)
        assert time.monotonic() - started < LATE_S


def test_forged_releases(address: str, channel: ChannelKind) -> None:
    """A release table full of noise frees nothing that is in use: results stay right, or there is no room."""

    def meanwhile(guest: Guest) -> None:
        forge_releases(guest)

    lie = Lie("releases", answer=lambda guest, request: guest.say(echoed(guest, request)), meanwhile=meanwhile)
    with LyingServer(address, lie), connect(address, channel) as client:
        held = client.empty((1000,), torch.uint8).fill_(7)
        for turn in range(40):
            assert torch.equal(client.call("echo", X + turn), X + turn)
        assert bool((held == 7).all())


def test_a_server_that_releases_nothing(address: str, channel: ChannelKind) -> None:
    """The client's arena fills: ArenaFull in time, with the facts; never a hang."""
    lie = Lie("keeps all", answer=lambda guest, request: guest.say(Reply(request.call_id, None, ())))
    with LyingServer(address, lie), connect(address, channel, timeout_s=SHORT_S) as client:

        def call() -> None:
            with contextlib.suppress(CallTimeout):  # on a slow machine; its tensor is kept all the same
                client.call("echo", torch.zeros(4000, dtype=torch.uint8))

        started = time.monotonic()
        with pytest.raises(ArenaFull, match="borrows by the peer"):
            [call() for _ in range(100)]
        assert time.monotonic() - started < LATE_S


def test_a_header_rewritten_while_in_use(address: str, channel: ChannelKind) -> None:
    """The client has read it once, and never reads it again."""

    def answer(guest: Guest, request: Request) -> None:
        guest.segment.view[:1024] = os.urandom(1024)
        guest.say(echoed(guest, request))

    with LyingServer(address, Lie("header", answer=answer)), connect(address, channel) as client:
        for _ in range(10):
            assert torch.equal(client.call("echo", X), X)


def test_posts_that_are_missing_and_posts_for_nothing(address: str) -> None:
    """Missing ones delay the client by at most half a second, needless ones cost a look each; the results are right."""

    def answer(guest: Guest, request: Request) -> None:
        if request.call_id == 0:
            guest.say_silently(echoed(guest, request))
        else:
            for _ in range(2000):
                guest.forger.post()
            guest.say(echoed(guest, request))

    with (
        LyingServer(address, Lie("posts", answer=answer)),
        Client(address, channel="doorbell", arena_bytes=ARENA_BYTES) as client,
    ):
        for turn in range(4):
            started = time.monotonic()
            assert torch.equal(client.call("echo", X), X)
            assert time.monotonic() - started < LATE_S, turn


def test_contents_that_change_after_a_snapshot(address: str, channel: ChannelKind) -> None:
    """A client that asked for snapshots has what was there when it looked, whatever the server writes later."""
    looked, rewritten = threading.Event(), threading.Event()

    def rewrite(guest: Guest) -> None:
        if looked.is_set() and not rewritten.is_set():
            start = guest.layout.data_offset
            guest.segment.view[start : start + 100] = bytes([9]) * 100
            rewritten.set()

    lie = Lie("changes", answer=lambda guest, request: guest.say(echoed(guest, request)), meanwhile=rewrite)
    with (
        LyingServer(address, lie),
        Client(address, channel=channel, arena_bytes=ARENA_BYTES, snapshot=True, timeout_s=LONG_S) as client,
    ):
        result = client.call("echo", X)
        looked.set()
        assert rewritten.wait(LONG_S)
        assert torch.equal(result, X)
