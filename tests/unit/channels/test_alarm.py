"""An alarm makes its descriptor readable once, and an epoll object that watches it edge-triggered sees it each time."""

from __future__ import annotations

import os
import resource
import select
import time
from collections.abc import Iterator

import pytest

from shmtransport.channels.alarm import Alarm


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    made = Alarm()
    yield made
    made.close()


@pytest.fixture
def epoll(alarm: Alarm) -> Iterator[select.epoll]:
    with select.epoll() as made:
        made.register(alarm.fileno(), select.EPOLLIN | select.EPOLLET)
        yield made


def test_it_goes_off_once_and_not_before_its_time(alarm: Alarm, epoll: select.epoll) -> None:
    """The same when it is set again, though the descriptor is never read."""
    assert not epoll.poll(0.02)
    for _ in range(3):
        started = time.monotonic()
        alarm.set(0.02)
        assert epoll.poll(5.0) == [(alarm.fileno(), select.EPOLLIN)]
        assert time.monotonic() - started >= 0.02
        assert not epoll.poll(0.03)


def test_setting_it_again_puts_it_off(alarm: Alarm, epoll: select.epoll) -> None:
    """The last setting counts, with whole seconds too."""
    alarm.set(0.01)
    alarm.set(1.5)
    assert not epoll.poll(0.1)
    alarm.set(0.01)
    assert epoll.poll(5.0)


def test_it_is_not_inherited_and_gives_its_descriptor_back() -> None:
    """A started program inherits no descriptor of it."""
    before = len(os.listdir("/proc/self/fd"))
    alarm = Alarm()
    assert not os.get_inheritable(alarm.fileno())
    alarm.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_many_open_files_are_an_oserror() -> None:
    """The error is the system's own."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            Alarm()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
