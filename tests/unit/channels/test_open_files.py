"""Free file descriptors are counted, not guessed, and errors about a lack of them give the figures."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator

import pytest

from shmtransport import OutOfResources
from shmtransport.channels import open_files
from tests.support.helpers import eventually

Limit = Callable[[int], None]


@pytest.fixture
def limit() -> Iterator[Limit]:
    """Set how many files this process may have open, until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def high() -> Iterator[int]:
    """An open descriptor with a number above most limits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    low = os.open("/dev/null", os.O_RDONLY)
    number = hard - 1
    os.dup2(low, number)
    os.close(low)
    yield number
    os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def can_be_opened() -> int:
    """Count how many descriptors can really be opened."""
    opened = []
    try:
        while True:
            opened.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return len(opened)
    finally:
        for descriptor in opened:
            os.close(descriptor)


@pytest.mark.parametrize("above", [1, 2, 5, 100])
def test_what_is_free_can_be_opened_and_no_more(limit: Limit, above: int) -> None:
    """Whichever numbers are taken: counting itself needs one, and closes it again."""
    limit(max(int(number) for number in os.listdir("/proc/self/fd")) + above)
    assert eventually(lambda: open_files.free() == can_be_opened())  # an earlier test's thread may still close one
    descriptor = os.open("/dev/null", os.O_RDONLY)
    try:
        assert eventually(lambda: open_files.free() == can_be_opened())
    finally:
        os.close(descriptor)


def test_a_descriptor_above_a_lowered_limit_takes_nothing_from_it(limit: Limit, high: int) -> None:
    """A process keeps the files that were open before its limit was lowered."""
    limit(high // 2)
    assert open_files.free() == can_be_opened()


def test_nothing_is_free_where_none_is_left_to_count_with(limit: Limit) -> None:
    """The directory can't be listed, which means that none is free."""
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    limit(min(reader, writer))  # all lower numbers are taken
    assert can_be_opened() == 0
    assert open_files.free() == 0


def test_without_proc_all_count_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """They can't be counted there, and refusing everything would be worse."""
    monkeypatch.setattr(open_files, "_DIRECTORY", "/nowhere/fd")
    assert open_files.free() == open_files.limit()


@pytest.mark.parametrize(("most", "kept"), [(20, 4), (64, 8), (100, 12), (128, 16), (1024, 16)])
def test_the_reserve_grows_with_the_limit(limit: Limit, most: int, kept: int) -> None:
    """An eighth of it, but never fewer than 4 and never more than 16."""
    limit(most)
    assert open_files.reserve() == kept


def test_what_lacks_descriptors_is_told_how_many(monkeypatch: pytest.MonkeyPatch, limit: Limit) -> None:
    """The error gives the purpose, how many it needs, the reserve, what is left, the limit, and the remedy."""
    limit(64)
    monkeypatch.setattr(open_files, "free", lambda: 15)
    open_files.require(15, "a thing")
    open_files.require(7, "a thing", kept=8)
    with pytest.raises(OutOfResources) as caught:
        open_files.require(16, "a thing")
    assert str(caught.value) == (
        "a thing needs 16 file descriptors; this process has 15 left of 64: close files or connections, or raise its "
        "limit (ulimit -n)"
    )
    with pytest.raises(
        OutOfResources, match="a thing needs 8 file descriptors and 8 are kept in reserve; this process"
    ):
        open_files.require(8, "a thing", kept=8)
