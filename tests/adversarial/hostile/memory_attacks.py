"""Connected clients that attack a server through shared memory: release tables, headers, message rings, posts."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from collections.abc import Callable

from shmtransport.core.layout import PAGE_BYTES
from shmtransport.memory.receive_arena import release_cells
from shmtransport.protocol.messages import Failure, Reply, encode
from tests.support.rings import CONSUMED, ENDED, POSTS, PUBLISHED, WANTS_ROOM

from .intrusions import TENSOR, carrying, descriptor
from .peers import ANSWER_S, Impostor, request
from .scene import BOTH, Scene, attack

_MAX = (1 << 64) - 1


class Meanwhile:
    """Repeats an action in a thread for as long as the ``with`` block lasts."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.is_set():
            self._step()
            time.sleep(0.0002)  # leave the processor to others

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()


# --- the release table and the header ---------------------------------------------------------------------------------


@attack(*BOTH)
def forged_releases(scene: Scene) -> None:
    """All cells overwritten with random, likely and even right numbers, again and again, while results are held."""
    one = scene.impostor()
    cells = release_cells(one.segment)
    numbers, held = random.Random(1), dict[int, int]()
    start, end = one.layout.release_offset, one.layout.release_offset + one.layout.release_bytes

    def forge() -> None:
        one.segment.view[start:end] = os.urandom(end - start)
        for slot in range(64):
            cells[slot] = numbers.randrange(300)
        if numbers.random() < 0.3:  # or else the calls would wait for room until chance makes some
            for slot, sequence in list(held.items()):
                cells[slot] = sequence

    with Meanwhile(forge):
        for turn in range(150):
            answer = one.ask(request(1 + turn * 37 % 4000, float(turn), method="fill"))
            assert isinstance(answer, (Reply, Failure))
            if isinstance(answer, Failure):
                assert answer.error_name == "ArenaFull", answer
            else:
                held.update((tensor.slot, tensor.sequence) for tensor in answer.tensors)
    one.segment.view[start:end] = b"\xff" * (end - start)
    one.assert_served()


@attack(*BOTH)
def results_never_released(scene: Scene) -> None:
    """A client that keeps all results fills its own arena, and gets no more of them."""
    one = scene.impostor()
    assert [type(one.ask(request(4000, 1.0, method="fill"))) for _ in range(4)] == [Reply] * 4
    for _ in range(100):
        one.send(request(4000, 1.0, method="fill"))
    other = scene.impostor()
    for _ in range(20):  # meanwhile the server comes to these
        other.assert_served()
    assert one.hear(0.1) is None


@attack(*BOTH)
def a_header_rewritten(scene: Scene) -> None:
    """The header changes while the connection is in use; the server, which has read it once, never reads it again."""
    one = scene.impostor()
    with Meanwhile(one.rewrite_header):
        for _ in range(50):
            one.assert_served()
    one.segment.view[:PAGE_BYTES] = b"\xff" * PAGE_BYTES
    one.assert_served()


@attack(*BOTH)
def contents_that_change(scene: Scene) -> None:
    """Tensors that are rewritten while handlers read them; wrong values harm only the attacker."""
    one = scene.impostor()
    start, nbytes = one.layout.data_offset, 1024

    def rewrite() -> None:
        one.segment.view[start : start + nbytes] = os.urandom(nbytes)

    with Meanwhile(rewrite):
        for _ in range(50):
            answer = one.ask(carrying(descriptor(0, (nbytes // 4,), "float32"), arguments=[TENSOR]))
            assert isinstance(answer, (Reply, Failure))
    one.assert_served()


# --- the message ring -------------------------------------------------------------------------------------------------


def forged(scene: Scene, *, served_before: bool = True) -> Impostor:
    """A client whose ring the test is about to forge; it may have been used properly before."""
    one = scene.impostor(max_message_bytes=1024)
    if served_before:
        for _ in range(3):
            one.assert_served()
    return one


@attack("doorbell")
def published_that_is_impossible(scene: Scene) -> None:
    """It goes back, is misaligned, beyond what the ring takes, or the largest number there is."""
    for served_before in (False, True):
        for change in (-8, -(1 << 62), 1, 4, 7, 1 << 20, 1 << 63, _MAX):
            one = forged(scene, served_before=served_before)
            value = (one.forger.cell(PUBLISHED) + change) % (1 << 64)
            one.forger.set_cell(PUBLISHED, value)
            one.forger.post()
            one.assert_dropped()


@attack("doorbell")
def a_record_that_is_too_long(scene: Scene) -> None:
    """A record that claims to be longer than what was published, than the ring, than all memory."""
    data = encode(request())
    for length in (len(data) + 64, 1020, 2048, 1 << 20, 1 << 31, (1 << 32) - 8, (1 << 32) - 1):
        one = forged(scene)
        one.forger.publish(data, length)
        one.assert_dropped()


@attack("doorbell")
def a_ring_of_empty_records(scene: Scene) -> None:
    """A ring full of empty messages: the first of them already ends the connection."""
    one = forged(scene, served_before=False)
    one.forger.set_records(bytes(one.forger.capacity))
    one.forger.set_cell(PUBLISHED, one.forger.capacity)
    one.forger.post()
    one.assert_dropped()


@attack("doorbell")
def consumed_that_is_impossible(scene: Scene) -> None:
    """The client claims to have read more than was ever written, or less than it has said before.

    The server looks at it only when its ring is full, so replies are left unread first.
    """
    for value in (1 << 40, 1 << 63, _MAX):
        one = forged(scene)
        one.forger.set_cell(CONSUMED, value)
        deadline = time.monotonic() + ANSWER_S
        while not one.ended():
            assert time.monotonic() < deadline, "the server never looked at it"
            one.ring.write(encode(request("x" * 200)))
            one.forger.post()
            time.sleep(0.001)
        one.assert_dropped(told=False)


@attack("doorbell")
def room_that_is_wanted_for_ever(scene: Scene) -> None:
    """Flags that ask for posts, or claim that the client has left, while it goes on: it is served all the same."""
    one = forged(scene)
    for wants, ended in ((1, 0), (_MAX, 0), (0, 1), (_MAX, _MAX)):
        one.forger.set_cell(WANTS_ROOM, wants)
        one.forger.set_cell(ENDED, ended)
        for _ in range(20):
            one.assert_served()


@attack("doorbell")
def a_ring_rewritten_while_in_use(scene: Scene) -> None:
    """Cells and records are overwritten with noise and with almost valid content, as fast as possible."""
    for seed in range(4):
        one, numbers = forged(scene), random.Random(seed)
        data = encode(request())
        proper = (struct.pack("<I", len(data)) + data).ljust(-(-(4 + len(data)) // 8) * 8, b"\0")

        def rewrite(one: Impostor = one, numbers: random.Random = numbers, proper: bytes = proper) -> None:
            capacity = one.forger.capacity
            noise = os.urandom(capacity) if numbers.random() < 0.2 else (proper * (capacity // len(proper) + 1))
            one.forger.set_records(noise[:capacity])
            one.forger.set_cell(PUBLISHED, one.forger.cell(PUBLISHED) + numbers.choice((0, 8, len(proper), capacity)))
            one.forger.set_cell(CONSUMED, one.forger.cell(PUBLISHED) + numbers.choice((0, 0, 0, 8, -8)))
            one.forger.post()

        with Meanwhile(rewrite):
            one.assert_dropped(told=False)


@attack("doorbell")
def everything_before_the_data_rewritten(scene: Scene) -> None:
    """Header, message ring and release table of a client, overwritten with noise at once, many times."""
    for _ in range(5):
        one = forged(scene)
        for _ in range(20):
            one.segment.view[: one.layout.data_offset] = os.urandom(one.layout.data_offset)
            one.forger.post()
            time.sleep(0.001)
        one.assert_dropped(told=False)


# --- posts ------------------------------------------------------------------------------------------------------------


@attack("doorbell")
def posts_that_count_wrongly(scene: Scene) -> None:
    """A client's count of its posts goes back or jumps, and it always says that it sleeps: others are served."""
    one = scene.impostor()
    one.ring.sleep(True)
    values = iter(range(1 << 62))

    def forge() -> None:
        one.forger.set_cell(POSTS, (next(values) * 0x9E3779B97F4A7C15) % (1 << 64))

    scene.while_others_call(forge, calls=10)
    for value in (0, 1, _MAX, 1 << 32, (1 << 32) - 1):
        one.forger.set_cell(POSTS, value)
        one.assert_served()


@attack("doorbell")
def posts_without_a_message(scene: Scene) -> None:
    """A client posts a hundred thousand times without a message, and then with one."""
    one = scene.impostor()
    for _ in range(100_000):
        one.forger.post()
    one.assert_served()


@attack("doorbell")
def messages_without_a_post(scene: Scene) -> None:
    """A client never posts: the server finds its messages by looking."""
    one = scene.impostor()
    for turn in range(30):
        assert one.ring.write(encode(request(call_id=turn)))
        assert isinstance(one.hear(), Reply)
