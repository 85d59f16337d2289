"""What a client may have of a server, and when its share is free again."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from shmtransport import Client, ConnectRefused, ConnectTimeout, SegmentError, TransportError
from shmtransport.protocol.messages import Goodbye, Offer, Refused
from tests.support.helpers import MIB, Serve, echo, eventually
from tests.support.strangers import HELLO, Stranger, hello


def test_arenas_beyond_a_clients_limit_are_refused_with_figures(serve: Serve, address: str) -> None:
    """max_arena_bytes bounds both arenas together; the message says asked and limit; the limit itself is granted."""
    serve({"max_arena_bytes": 4 * MIB}, echo=echo)
    with pytest.raises(ConnectRefused, match=r"6\.0 MiB.*max_arena_bytes is 4\.0 MiB"):
        Client(address, arena_bytes=3 * MIB)
    with pytest.raises(ConnectRefused, match=r"5\.0 MiB.*max_arena_bytes is 4\.0 MiB"):
        Client(address, arena_bytes=MIB, reply_arena_bytes=4 * MIB)
    with Client(address, arena_bytes=3 * MIB, reply_arena_bytes=MIB) as client:
        assert client.call("echo", torch.ones(3)).tolist() == [1, 1, 1]


def test_arenas_beyond_what_all_clients_may_have_are_refused_until_one_leaves(serve: Serve, address: str) -> None:
    """max_total_arena_bytes counts what is held now; a client that leaves gives its share back."""
    serve({"max_total_arena_bytes": 4 * MIB}, echo=echo)
    first = Client(address, arena_bytes=MIB)
    with pytest.raises(ConnectRefused, match=r"4\.0 MiB .*1 clients hold 2\.0 MiB of the 4\.0 MiB.*max_total_arena"):
        Client(address, arena_bytes=2 * MIB)
    with Client(address, arena_bytes=MIB) as second:
        assert second.call("echo", 2) == 2
        with pytest.raises(ConnectRefused):
            Client(address, arena_bytes=4096)
    first.close()
    with Client(address, arena_bytes=2 * MIB) as whole:
        assert whole.call("echo", 3) == 3


def test_more_clients_than_the_limit_are_refused_until_one_leaves(serve: Serve, address: str) -> None:
    """max_clients counts who is connected now; those who are stay undisturbed."""
    serve({"max_clients": 2}, echo=echo)
    first, second = Client(address), Client(address)
    with pytest.raises(ConnectRefused, match=r"2.*max_clients"):
        Client(address)
    assert (first.call("echo", 1), second.call("echo", 2)) == (1, 2)
    first.close()
    with Client(address) as third:
        assert third.call("echo", 3) == 3
    second.close()


@pytest.mark.parametrize("arena_bytes", [-1, 1 << 70])
def test_a_nonsensical_arena_size_is_an_error_of_this_package(serve: Serve, address: str, arena_bytes: int) -> None:
    """Never an OverflowError or a server that ends."""
    serve(echo=echo)
    with pytest.raises(TransportError):
        Client(address, arena_bytes=arena_bytes)
    with Client(address) as client:
        assert client.call("echo", 1) == 1


def test_an_arena_that_dev_shm_cant_hold_is_a_segment_error_with_figures(serve: Serve, address: str) -> None:
    """Room is reserved at creation: the error says free, asked and remedy, and nothing stays behind."""
    shm = os.statvfs("/dev/shm")
    too_much = 2 * shm.f_blocks * shm.f_frsize
    serve({"max_arena_bytes": 4 * too_much, "max_total_arena_bytes": 4 * too_much}, echo=echo)
    with pytest.raises(SegmentError, match=r"/dev/shm has [\d.]+ MiB free of [\d.]+ MiB.*asked for.*arena_bytes"):
        Client(address, arena_bytes=too_much, reply_arena_bytes=MIB)
    with pytest.raises(ConnectRefused, match=r"/dev/shm has [\d.]+ MiB free of [\d.]+ MiB.*asked for"):
        Client(address, arena_bytes=MIB, reply_arena_bytes=too_much)
    with Client(address, arena_bytes=MIB) as client:
        assert client.call("echo", 1) == 1


def test_a_client_whose_connecting_failed_takes_no_share_of_the_limits(serve: Serve, address: str) -> None:
    """A client that gives up after the server's offer says goodbye; the server frees its share without a time-out."""
    shm = os.statvfs("/dev/shm")
    too_much = 2 * shm.f_blocks * shm.f_frsize
    serve({"max_arena_bytes": 2 * too_much, "max_total_arena_bytes": too_much + MIB}, echo=echo)
    with pytest.raises(SegmentError):
        Client(address, arena_bytes=too_much, reply_arena_bytes=4096)
    with Client(address, arena_bytes=MIB) as client:
        assert client.call("echo", 1) == 1


def test_a_client_that_gave_up_connecting_takes_no_share_of_the_limits(serve: Serve, address: str) -> None:
    """A Hello that a busy server reads after its sender has left reserves nothing: the offer can't be delivered."""
    go = threading.Event()
    serve({"max_total_arena_bytes": 4 * MIB}, wait=lambda: go.wait(10), echo=echo)
    with Client(address, arena_bytes=4096) as busy:
        pending = busy.submit("wait")
        with pytest.raises(ConnectTimeout):
            Client(address, arena_bytes=MIB, connect_timeout_s=0.2)
        go.set()
        assert pending.result() is True
        with Client(address, arena_bytes=MIB + MIB // 2) as client:
            assert client.call("echo", 1) == 1


def test_hellos_that_never_finish_are_bounded_and_forgotten(
    serve: Serve, address: str, stranger: Callable[[], Stranger]
) -> None:
    """A flood gets no further than max_clients, allocates nothing, and after the time-out a client gets in."""
    server = serve({"max_clients": 4}, echo=echo)
    admission = server._admission
    admission._options = replace(admission._options, handshake_timeout_s=0.3)
    before = set(os.listdir("/dev/shm"))
    answers = []
    for _ in range(20):
        one = stranger()
        one.send(HELLO)
        answers.append(one.receive())
    assert sum(isinstance(answer, Refused) for answer in answers) >= 16
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("shmtransport-")} == set()
    time.sleep(0.35)
    with Client(address) as client:
        assert client.call("echo", 1) == 1


def test_an_unfinished_hello_does_not_count_against_the_total_for_ever(
    serve: Serve, address: str, stranger: Callable[[], Stranger]
) -> None:
    """The server takes back what a stranger reserved and never used."""
    server = serve({"max_total_arena_bytes": 4 * MIB}, echo=echo)
    admission = server._admission
    admission._options = replace(admission._options, handshake_timeout_s=0.3)
    one = stranger()
    one.send(hello(2 * MIB))
    assert isinstance(one.receive(), Offer)
    with pytest.raises(ConnectRefused, match="max_total_arena_bytes"):
        Client(address, arena_bytes=MIB)
    time.sleep(0.35)
    with Client(address, arena_bytes=2 * MIB) as client:
        assert client.call("echo", 1) == 1


def test_a_client_that_says_goodbye_in_mid_handshake_is_forgotten_at_once(
    serve: Serve, address: str, stranger: Callable[[], Stranger]
) -> None:
    """Its share is free without waiting for a time-out."""
    serve({"max_clients": 1}, echo=echo)
    one = stranger()
    one.send(HELLO)
    assert isinstance(one.receive(), Offer)
    one.send(Goodbye("changed my mind"))
    one.send(HELLO)
    assert isinstance(one.receive(), Offer)
    one.send(Goodbye("again"))

    def connects() -> bool:  # another socket's hello may overtake the goodbye
        with contextlib.suppress(ConnectRefused), Client(address) as client:
            return bool(client.call("echo", 1) == 1)
        return False

    assert eventually(connects, 5.0), "well before the handshake's time-out"
