"""Clients that attack a server with streams and one-way calls: More, Cancel and Part in the wrong place or number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from msgspec.msgpack import Ext

from shmtransport.channels.backlog import QUEUE_LIMIT
from shmtransport.protocol.messages import (
    MAX_WINDOW,
    AnyMessage,
    Cancel,
    Failure,
    Goodbye,
    Message,
    More,
    OneWayRequest,
    Part,
    Reply,
    StreamRequest,
    encode,
)
from tests.support.helpers import eventually

from .attacks import said, with_each_field_wrong
from .floods import try_to_send
from .intrusions import HUGE, TENSOR
from .peers import ARENA_BYTES, Impostor, request
from .scene import BOTH, Scene, attack

ENDLESS = 1 << 40
MARK = 1 << 50
_PATIENCE_S = 60.0
"""For what the server does in the end, however busy the machine is."""
STREAMS = 200  # fewer than an AsyncServer's max_calls_in_progress
_OUT_OF_RANGE = (0, -1, MAX_WINDOW + 1, 1 << 32, HUGE, 1 << 63, (1 << 64) - 1, -(1 << 63))
_FIELDS: dict[str, list[Any]] = {
    "OneWayRequest": [9, 0, "echo", [], {}, []],
    "StreamRequest": [10, 0, "count", [3], {}, [], 1],
    "More": [12, 0, 1],
    "Cancel": [13, 0],
}


def stream(*arguments: Any, method: str = "count", call_id: int = 0, window: int = 4) -> StreamRequest:
    return StreamRequest(call_id, method, list(arguments), {}, (), window)


def one_way(*arguments: Any, method: str = "echo", call_id: int = 0) -> OneWayRequest:
    return OneWayRequest(call_id, method, list(arguments), {}, ())


def heard_until(one: Impostor, is_last: Callable[[AnyMessage], bool]) -> list[AnyMessage]:
    """What the server sends, up to and without the message that is the last."""
    heard: list[AnyMessage] = []
    while not is_last(message := _next(one)):
        heard.append(message)
    return heard


def _next(one: Impostor) -> AnyMessage:
    message = one.hear()
    assert message is not None, "nothing more comes"
    assert not isinstance(message, Goodbye), message
    return message


def heard_before_an_answer(one: Impostor) -> list[AnyMessage]:
    """Check that the client is served; return what else the server has sent before it answers."""
    one.send(request("served", call_id=MARK))
    return heard_until(one, lambda message: message == Reply(MARK, "served", ()))


def send_and_read(one: Impostor, messages: list[Message], at_once: int = 50) -> list[AnyMessage]:
    """Send all of these, and read what comes meanwhile."""
    heard = []
    for start in range(0, len(messages), at_once):
        for message in messages[start : start + at_once]:
            one.send(message)
        heard += heard_before_an_answer(one)
    return heard


class Watch:
    """What the server holds of its clients, asked by a client of the watcher's own, which breaks no rule."""

    def __init__(self, scene: Scene) -> None:
        self._one = scene.impostor()
        self._begun, _, self._connections = self._held()

    def _held(self) -> tuple[int, int, int]:
        answer = self._one.ask(request(method="held"))
        assert isinstance(answer, Reply), answer
        begun, closed, connections = answer.result
        return begun, closed, connections

    def begun(self) -> int:
        """How many generators have begun since it watches."""
        return self._held()[0] - self._begun

    def open(self) -> int:
        """How many generators have begun and not ended."""
        begun, closed, _ = self._held()
        return begun - closed

    def assert_begun(self, count: int) -> None:
        """Check that this many begin."""
        assert eventually(lambda: self.begun() >= count, _PATIENCE_S), (
            f"{self.begun()} generators have begun, not {count}"
        )

    def assert_all_closed(self, *, begun: int = 1) -> None:
        """Check that at least this many generators have begun, and that all end."""
        self.assert_begun(begun)
        assert eventually(lambda: self.open() == 0, _PATIENCE_S), f"{self.open()} generators are open"

    def assert_forgotten(self) -> None:
        """Check that the server forgets all connections that were made since."""
        forgotten = eventually(lambda: self._held()[2] <= self._connections, _PATIENCE_S)
        assert forgotten, f"{self._held()[2] - self._connections} stay"


# --- bytes and kinds --------------------------------------------------------------------------------------------------


@attack(*BOTH)
def stream_messages_cut_short(scene: Scene) -> None:
    """Every proper prefix of a StreamRequest, OneWayRequest, More and Cancel."""
    whole = [said(fields) for fields in _FIELDS.values()]
    scene.assert_each_costs_the_connection([data[:length] for data in whole for length in range(3, len(data))])


@attack(*BOTH)
def stream_messages_with_more_behind_them(scene: Scene) -> None:
    """A proper message of each kind, followed by a byte or by itself again."""
    whole = [said(fields) for fields in _FIELDS.values()]
    scene.assert_each_costs_the_connection([data + more for data in whole for more in (b"\0", b"\xc0", data)])


@attack(*BOTH)
def requests_of_wrong_types(scene: Scene) -> None:
    """Each field of a StreamRequest and of a OneWayRequest of every wrong type, and one too many or too few."""
    for kind in ("StreamRequest", "OneWayRequest"):
        fields = _FIELDS[kind]
        scene.assert_each_costs_the_connection([*with_each_field_wrong(fields), said(fields[:-1])])


@attack(*BOTH)
def more_and_cancel_of_wrong_types(scene: Scene) -> None:
    """Each field of a More and of a Cancel of every wrong type, and one too many or too few, for a stream that is open.

    The generator is closed as the connection ends.
    """
    watch = Watch(scene)
    wrong = [data for kind in ("More", "Cancel") for data in with_each_field_wrong(_FIELDS[kind])]
    for data in [*wrong, said([12, 0]), said([12]), said([13])]:
        one = scene.impostor()
        one.send(stream(ENDLESS, window=1))
        assert one.hear() == Part(0, 0, ())
        one.send(data)
        one.assert_dropped()
    watch.assert_all_closed(begun=len(wrong))


@attack(*BOTH)
def numbers_out_of_range(scene: Scene) -> None:
    """Windows, counts and call ids of zero, below it, above the limit, and beyond 64 bits."""
    scene.assert_each_costs_the_connection(
        [
            *(said([10, 0, "count", [3], {}, [], window]) for window in _OUT_OF_RANGE),
            *(said([12, 0, count]) for count in _OUT_OF_RANGE),
            *(said([*fields[:1], call_id, *fields[2:]]) for fields in _FIELDS.values() for call_id in (-1, 1 << 63)),
        ]
    )


@attack(*BOTH)
def requests_whose_tensors_are_none(scene: Scene) -> None:
    """A StreamRequest and a OneWayRequest with descriptors out of range, or extensions that name no tensor."""
    outside, inside = [ARENA_BYTES, [8], "uint8", 0, 1], [0, [8], "uint8", 0, 1]
    for fields in (_FIELDS["StreamRequest"], _FIELDS["OneWayRequest"]):
        scene.assert_each_costs_the_connection(
            [
                said([*fields[:3], arguments, {}, descriptors, *fields[6:]])
                for arguments, descriptors in (
                    ([TENSOR], [outside]),
                    ([TENSOR], []),
                    ([TENSOR], [inside] * 2),
                    ([Ext(1, b"\1\0")], [inside]),
                    ([Ext(77, b"\0\0")], []),
                )
            ]
        )


@attack(*BOTH)
def answers_by_a_client(scene: Scene) -> None:
    """A Part, a Reply and a Failure, for no call, and for a stream of its own that is open."""
    watch = Watch(scene)
    answers = [Part(0, 1, ()), Reply(0, 1, ()), Failure(0, "handler", "X", "x")]
    scene.assert_each_costs_the_connection([*answers, said([11, 0, TENSOR, [[0, [8], "uint8", 0, 1]]])])
    for answer in answers:
        one = scene.impostor()
        one.send(stream(ENDLESS, window=1))
        assert one.hear() == Part(0, 0, ())
        one.send(answer)
        one.assert_dropped()
    watch.assert_all_closed(begun=3)


# --- More -------------------------------------------------------------------------------------------------------------


@attack(*BOTH)
def more_for_what_is_no_stream(scene: Scene) -> None:
    """More for unknown calls, for a plain one, before a stream begins and after it has ended: it changes nothing."""
    one = scene.impostor()
    for call_id in (0, 1, HUGE):
        one.send(More(call_id, MAX_WINDOW))
    one.send(request("plain", call_id=1))
    one.send(More(1, 1))
    assert heard_before_an_answer(one) == [Reply(1, "plain", ())]
    one.send(stream(3, window=2))
    assert [one.hear(), one.hear()] == [Part(0, 0, ()), Part(0, 1, ())]
    for _ in range(5):
        assert heard_before_an_answer(one) == []  # what came before the stream counts for nothing
    one.send(More(0, MAX_WINDOW))
    assert [one.hear(), one.hear()] == [Part(0, 2, ()), Reply(0, None, ())]
    for _ in range(100):
        one.send(More(0, MAX_WINDOW))
    assert heard_before_an_answer(one) == []


@attack(*BOTH)
def more_that_adds_up(scene: Scene) -> None:
    """Far more is asked for than a window may be, and than there is: each part comes once, in order, then the end."""
    watch, one, parts = Watch(scene), scene.impostor(), 1500
    one.send(stream(parts, window=MAX_WINDOW))
    heard: list[AnyMessage] = []
    while Reply(0, None, ()) not in heard[-100:]:
        heard += send_and_read(one, [More(0, MAX_WINDOW)] * 50)
    assert heard == [*(Part(0, number, ()) for number in range(parts)), Reply(0, None, ())]
    assert heard_before_an_answer(one) == []
    watch.assert_all_closed()


@attack(*BOTH)
def more_without_end(scene: Scene) -> None:
    """A client asks for more of endless streams and reads nothing: it is dropped, and the generators are closed."""
    watch, one = Watch(scene), scene.impostor(queue=8)
    for call_id in range(20):
        one.send(stream(ENDLESS, 30_000, call_id=call_id, window=MAX_WINDOW))
    watch.assert_begun(1)
    more = [encode(More(call_id, MAX_WINDOW)) for call_id in range(20)]

    def is_dropped() -> bool:
        for data in more:
            if one.channel == "zmq":
                try_to_send(one.wire, data)
            elif one.ring.write(data):
                one.forger.post()
        return watch.open() == 0

    assert eventually(is_dropped)
    watch.assert_forgotten()


@attack(*BOTH)
def streams_that_are_read_as_fast_as_they_come(scene: Scene) -> None:
    """Many streams are asked for as much as may be unread at once: their parts leave time for the calls of others."""
    watch, one = Watch(scene), scene.impostor(queue=100_000)
    each = QUEUE_LIMIT * 9 // 10 // STREAMS  # beyond the limit a client that reads too slowly is dropped
    for call_id in range(STREAMS):
        one.send(stream(ENDLESS, call_id=call_id, window=1))
        assert one.hear() == Part(call_id, 0, ())
    for call_id in range(STREAMS):
        one.send(More(call_id, each))
    heard: Counter[int] = Counter()

    def read_and_ask_again() -> None:
        part = _assert_part(one)
        heard[part.call_id] += 1
        if heard[part.call_id] % each == 0:
            one.send(More(part.call_id, each))

    scene.while_others_call(read_and_ask_again)
    one.send(Goodbye("enough"))
    watch.assert_all_closed(begun=STREAMS)


def _assert_part(one: Impostor) -> Part:
    message = one.hear()
    assert isinstance(message, Part), message
    return message


# --- Cancel -----------------------------------------------------------------------------------------------------------


@attack(*BOTH)
def cancels_of_nothing(scene: Scene) -> None:
    """Thousands of Cancels of unknown calls, of answered ones, of calls to come."""
    one = scene.impostor()
    assert send_and_read(one, [Cancel(call_id) for call_id in range(5000)]) == []
    one.send(Cancel(HUGE))
    one.send(stream(2, call_id=7))
    assert [one.hear(), one.hear(), one.hear()] == [Part(7, 0, ()), Part(7, 1, ()), Reply(7, None, ())]
    assert send_and_read(one, [Cancel(MARK), Cancel(7)] * 200) == []


@attack(*BOTH)
def cancels_of_a_call_in_progress(scene: Scene) -> None:
    """A call is cancelled while it is handled, and while it waits for its turn, several times over."""
    one = scene.impostor()
    one.send(request(0.1, method="sleep", call_id=1))
    for call_id in (2, 3, 4):
        one.send(request("waits", call_id=call_id))
    for call_id in (1, 3, 1, 3):
        one.send(Cancel(call_id))
    answers = [Reply(call_id, None if call_id == 1 else "waits", ()) for call_id in (1, 2, 3, 4)]
    heard = heard_before_an_answer(one) + heard_before_an_answer(one)
    assert not [message for message in heard if message not in answers]
    assert answers[1] in heard
    assert answers[3] in heard


@attack(*BOTH)
def cancels_of_a_stream_many_times(scene: Scene) -> None:
    """A stream is cancelled again and again, and asked for more between and after that: it is closed once."""
    watch, one = Watch(scene), scene.impostor()
    for turn in range(30):
        one.send(stream(ENDLESS, call_id=turn))
        if turn % 2:
            assert isinstance(one.hear(), Part)
        for message in (Cancel(turn), More(turn, 5), Cancel(turn), Cancel(turn)):
            one.send(message)
        if turn % 2:
            heard_before_an_answer(one)
    heard_before_an_answer(one)
    watch.assert_all_closed(begun=15)
    heard_before_an_answer(one)
    assert heard_before_an_answer(one) == []


@attack(*BOTH)
def streams_begun_and_cancelled(scene: Scene) -> None:
    """Hundreds of streams, each of them cancelled right away or after the next has begun."""
    watch, one = Watch(scene), scene.impostor()
    at_once = [message for call_id in range(500) for message in (stream(ENDLESS, call_id=call_id), Cancel(call_id))]
    send_and_read(one, at_once)
    send_and_read(
        one,
        [message for call_id in range(500) for message in (stream(ENDLESS, call_id=call_id + 1), Cancel(call_id))],
    )
    one.send(Cancel(500))
    watch.assert_all_closed()
    heard_before_an_answer(one)
    assert heard_before_an_answer(one) == []


# --- one id for several calls -----------------------------------------------------------------------------------------


@attack(*BOTH)
def one_id_for_many_streams(scene: Scene) -> None:
    """The same call id for hundreds of streams, none of which is cancelled: at most the last of them goes on."""
    watch, one = Watch(scene), scene.impostor()
    send_and_read(one, [stream(ENDLESS, call_id=5, window=1) for _ in range(300)])
    assert eventually(lambda: watch.open() <= 1)
    one.send(Cancel(5))
    watch.assert_all_closed()
    heard_before_an_answer(one)


@attack(*BOTH)
def one_id_for_calls_of_every_kind(scene: Scene) -> None:
    """The same call id for streams, plain calls and one-way calls in turn, with More and Cancel between them."""
    watch, one = Watch(scene), scene.impostor()
    kinds: list[Message] = [
        stream(ENDLESS),
        request("plain"),
        one_way("one way"),
        stream([100] * 10, method="tensors"),
        More(0, 2),
        request(0.002, method="sleep"),
        stream(3),
        one_way(0.002, method="sleep"),
        request(10, 1.0, method="fill"),
    ]
    for turn in range(40):
        send_and_read(one, kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)])
        if turn % 3 == 0:
            one.send(Cancel(0))
    one.send(Goodbye("enough"))
    watch.assert_all_closed()
    watch.assert_forgotten()


# --- streams that are left alone --------------------------------------------------------------------------------------


def left_alone(scene: Scene) -> tuple[Watch, Impostor]:
    """A client with hundreds of open streams of which it reads nothing."""
    watch, one = Watch(scene), scene.impostor()
    for call_id in range(STREAMS):
        kind = stream(ENDLESS, call_id=call_id) if call_id % 2 else stream([50] * 9, method="tensors", call_id=call_id)
        one.send(kind)
    watch.assert_begun(STREAMS)
    return watch, one


@attack(*BOTH)
def streams_left_by_a_goodbye(scene: Scene) -> None:
    """Hundreds of streams are never read; the client says goodbye: all generators are closed."""
    watch, one = left_alone(scene)
    one.send(Goodbye("enough"))
    watch.assert_all_closed(begun=STREAMS)
    watch.assert_forgotten()


@attack(*BOTH)
def streams_left_without_a_goodbye(scene: Scene) -> None:
    """Hundreds of streams are never read; the client gives up its segment in silence: all generators are closed."""
    watch, one = left_alone(scene)
    one.segment.close()
    watch.assert_all_closed(begun=STREAMS)
    watch.assert_forgotten()


@attack(*BOTH)
def streams_left_by_a_malformed_message(scene: Scene) -> None:
    """Hundreds of streams are never read; the client breaks the protocol: all generators are closed."""
    watch, one = left_alone(scene)
    one.send(b"noise")
    watch.assert_all_closed(begun=STREAMS)
    watch.assert_forgotten()


@attack(*BOTH)
def streams_without_end(scene: Scene) -> None:
    """Streams are opened without end, and none goes on: beyond a limit each fails with a typed error."""
    watch, one = Watch(scene), scene.impostor()
    failures: list[Failure] = []
    for start in range(0, 3000, 50):
        for turn in range(50):
            one.send(stream(ENDLESS, call_id=start + turn, window=1))
        failures += [answer for _ in range(50) if isinstance(answer := _next(one), Failure)]
        if failures:
            break
    assert failures, "thousands of streams may be open"
    assert failures[0].error_name == "LocalProtocolError"
    assert "wait for some of them" in failures[0].text
    one.send(Goodbye("enough"))
    watch.assert_all_closed()


# --- parts without room -----------------------------------------------------------------------------------------------


@attack(*BOTH)
def parts_never_released(scene: Scene) -> None:
    """Streams with tensors of which none is released: they stand still, until they are cancelled."""
    watch, one = Watch(scene), scene.impostor()
    for call_id in range(40):
        one.send(stream([4000] * 100, method="tensors", call_id=call_id, window=MAX_WINDOW))
    for _ in range(ARENA_BYTES // 4096):
        _assert_part(one)
    for call_id in range(40):
        one.send(Cancel(call_id))
    watch.assert_all_closed()


@attack(*BOTH)
def parts_that_wait_for_room(scene: Scene) -> None:
    """Open streams are all asked for parts as large as the arena while there is no room, and then cancelled."""
    watch, one, size = Watch(scene), scene.impostor(arena_bytes=1 << 18), 1 << 18  # an AsyncServer makes a part of each
    for call_id in range(STREAMS):
        one.send(stream([0, *[size] * 9], method="tensors", call_id=call_id, window=1))
        _assert_part(one)
    for call_id in range(STREAMS):
        one.send(More(call_id, 9))
    _assert_part(one)  # it takes all of the arena
    for call_id in range(STREAMS):
        one.send(Cancel(call_id))
    watch.assert_all_closed(begun=STREAMS)


@attack(*BOTH)
def calls_left_while_there_is_no_room(scene: Scene) -> None:
    """A client's calls wait since it has filled its arena, and it leaves or cancels them: nothing of it stays."""
    watch = Watch(scene)
    for last in ([], [Cancel(call_id) for call_id in range(200)]):
        one = scene.impostor()
        one.send(request(ARENA_BYTES // 4, 1.0, method="fill", call_id=1000))
        assert isinstance(one.hear(), Reply)
        one.send(request(ARENA_BYTES // 4, 1.0, method="fill", call_id=1001))
        for call_id in range(200):
            one.send(request("waits", call_id=call_id))
        for _ in range(20):  # meanwhile the server comes to these
            watch.begun()
        for message in (*last, Goodbye("enough")):
            one.send(message)
        watch.assert_forgotten()


@attack(*BOTH)
def small_results_that_wait_for_room(scene: Scene) -> None:
    """More than a thousand streams, and as many calls, with small results by a client that has filled its arena.

    However many wait, no other client waits longer for that, and nothing of them stays.
    """
    watch, one = Watch(scene), scene.impostor(arena_bytes=1 << 20)
    one.send(request((1 << 18) - 16, 1.0, method="fill"))
    assert isinstance(one.hear(), Reply)
    for call_id in range(0, 2400, 2):
        one.send(stream([64] * 9, method="tensors", call_id=call_id))
        one.send(request(1, 1.0, method="fill", call_id=call_id + 1))
    one.send(Goodbye("enough"))
    watch.assert_forgotten()
    watch.assert_all_closed(begun=0)


# --- one-way calls ----------------------------------------------------------------------------------------------------


@attack(*BOTH)
def one_way_calls_without_end(scene: Scene) -> None:
    """Several clients make one-way calls without end, also of methods that are unknown, stream or raise: no answers."""
    clients = [scene.impostor() for _ in range(3)]
    proper = encode(one_way("x" * 100))

    def burst() -> None:
        for one in clients:
            for _ in range(50):
                one.send(proper)
        for one in clients:
            assert heard_before_an_answer(one) == []

    scene.while_others_call(burst)
    wrong = [
        one_way(method="unknown"),
        one_way(method=""),
        one_way("not a tensor", method="double"),
        one_way(1, 2, 3),
        one_way(3, method="count"),
        one_way(-1, 1.0, method="fill"),
    ]
    for one in clients:
        assert send_and_read(one, wrong * 10) == []


@attack(*BOTH)
def one_way_calls_of_clients_that_leave(scene: Scene) -> None:
    """Clients leave as many large one-way calls as they may behind a slow one: the server keeps few of all of them."""
    watch = Watch(scene)
    data = encode(one_way("x" * 60_000))
    for _ in range(8):
        one = scene.impostor(queue=300)
        one.send(one_way(0.1, method="sleep"))
        for _ in range(250):
            one.send(data)
        one.send(Goodbye("enough"))
        one.assert_dropped(told=False)
    watch.assert_forgotten()
