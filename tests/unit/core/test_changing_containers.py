"""A list or dict that changes while it is encoded: as Python's own iteration has it, in both twins."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shmtransport.core import python_twin
from shmtransport.errors import LocalProtocolError
from shmtransport.protocol.messages import Reply, decode
from shmtransport.protocol.values import pack
from tests.support.cores import native_twin, needs_native
from tests.unit.core.test_twins import outcome

Change = Callable[[Any], Any]

_TENSOR = torch.ones(2)


def _encode(core: ModuleType, value: Any, change: Change) -> bytes:
    """The bytes of a reply; each tensor in it changes what is being encoded."""
    exported: list[None] = []

    def export(_tensor: Any) -> int:
        exported.append(None)
        assert len(exported) < 1000
        change(value)
        return 0

    data, *_ = core.encode_reply(0, value, lambda one, depth: pack(one, export, depth), [], None)
    return data


def _result(data: bytes) -> Any:
    reply = decode(data)
    assert isinstance(reply, Reply)
    return reply.result


@pytest.mark.parametrize("size", [1, 2, 14, 15, 16, 17, 65534, 65535, 65536])
def test_a_list_that_grows_is_sent_with_what_came(core: ModuleType, size: int) -> None:
    """Its new items are encoded too, and the count in front is that of all."""
    items = [1] * (size - 1) + [_TENSOR]
    result = _result(_encode(core, items, lambda items: items.extend((2, "three"))))
    assert len(result) == size + 2
    assert result[-2:] == [2, "three"]
    assert result[: size - 1] == [1] * (size - 1)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 65535, 65536, 65537])
@pytest.mark.parametrize("change", [list.pop, list.clear], ids=["pop", "clear"])
def test_a_list_that_shrinks_is_sent_without_what_went(core: ModuleType, size: int, change: Change) -> None:
    """What was encoded before stays, and the count in front is that of all."""
    items = [_TENSOR] + [1] * (size - 1)
    result = _result(_encode(core, items, change))
    assert len(result) == (1 if change is list.clear else max(size - 1, 1))
    assert result[1:] == [1] * (len(result) - 1)


def _swap(entries: dict[Any, Any]) -> None:
    del entries[next(iter(entries))]
    entries[len(entries) + 1000] = None


@pytest.mark.parametrize("size", [1, 2, 9, 100])
@pytest.mark.parametrize(
    "change",
    [dict.clear, dict.popitem, lambda entries: entries.update({"more": 1}), _swap],
    ids=["clear", "pop", "add", "swap"],
)
def test_a_dict_that_changes_is_an_error(core: ModuleType, size: int, change: Change) -> None:
    """Of the class that Python raises when it iterates over it."""
    for at in {0, size // 2, size - 1}:
        entries = {number: _TENSOR if number == at else number for number in range(size)}
        with pytest.raises(RuntimeError, match="chang"):
            _encode(core, {"outer": entries}, lambda outer: change(outer["outer"]))


def test_a_key_that_came_meanwhile_is_checked(core: ModuleType) -> None:
    """No key but str and int is sent."""

    def swap(entries: dict[Any, Any]) -> None:
        entries.pop("b", None)
        entries[b"c"] = None

    with pytest.raises(LocalProtocolError, match="not bytes"):
        _encode(core, {"a": _TENSOR, "b": 1}, swap)


@pytest.mark.parametrize("size", [5, 6, 10])  # the tables of 5 and 10 keys are full
def test_a_key_that_is_found_twice_is_an_error(core: ModuleType, size: int) -> None:
    """One that was taken out and put back moves to the end; whether Python notices depends on the dict's table."""
    entries: dict[Any, Any] = {}
    for number in range(size):
        entries["a" if number == 0 else number] = _TENSOR if number == size - 2 else 1
    with pytest.raises(RuntimeError, match="chang"):
        _encode(core, entries, lambda entries: entries.update({"a": entries.pop("a")}))


def test_an_item_may_change_the_list_that_it_is_in(core: ModuleType) -> None:
    """Its own method is called where another library's arrays are exported."""

    class Array:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self, **options: Any) -> Any:
            items.clear()
            return _TENSOR.__dlpack__()

    items: list[Any] = [1, Array(), 2]
    data, *_ = core.encode_reply(0, items, lambda one, depth: pack(one, lambda _tensor: 0, depth), [], None)
    assert len(_result(data)) == 2


_list_changes = st.sampled_from(
    [
        lambda items: items.append(5),
        lambda items: items.append([_TENSOR, "x"]),
        lambda items: items.insert(0, 6),
        lambda items: items.extend([7] * 20),
        lambda items: items and items.pop(),
        lambda items: items and items.pop(0),
        lambda items: items.clear(),
        lambda items: items.reverse(),
        lambda items: items.append(2**70),
        lambda items: items.append({1}),
        lambda items: None,
    ]
)
_dict_changes = st.sampled_from(
    [
        lambda entries: entries.update({len(entries): 5}),
        lambda entries: entries and entries.popitem(),
        lambda entries: entries.clear(),
        _swap,
        lambda entries: entries.update({"a": entries.pop("a", 1)}),
        lambda entries: entries.update({"a": entries.pop(next(iter(entries)))}),
        lambda entries: entries.update({b"x": entries.popitem()[1]}),
        lambda entries: entries.update(dict.fromkeys(entries, 8)),
        lambda entries: None,
    ]
)


def _times(changes: list[Change]) -> Change:
    """The first change at the first tensor, the second at the second, then none."""
    left = list(changes)
    return lambda value: left.pop(0)(value) if left else None


@needs_native
@given(
    st.lists(st.sampled_from([1, "é", _TENSOR, (_TENSOR, 2)]), max_size=17),
    st.lists(_list_changes, max_size=3),
)
@settings(max_examples=400)
def test_both_encode_changing_lists_alike(items: list[Any], changes: list[Change]) -> None:
    """Whatever happens to the list, and when: the same bytes, or the same class of error."""
    _same_of_both(lambda: list(items), changes)


@needs_native
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", *range(20)]), st.sampled_from([1, _TENSOR, [_TENSOR]]), max_size=17
    ),
    st.lists(_dict_changes, max_size=3),
)
@settings(max_examples=400)
def test_both_encode_changing_dicts_alike(entries: dict[Any, Any], changes: list[Change]) -> None:
    """Whatever happens to the dict, and when."""
    _same_of_both(lambda: dict(entries), changes)


def _same_of_both(make: Callable[[], Any], changes: list[Change]) -> None:
    results = []
    for core in (python_twin, native_twin):
        assert core is not None
        result = outcome(lambda core=core: _encode(core, make(), _times(changes)))  # type: ignore[misc]
        kind = result if type(result) is bytes else result[0]
        results.append(
            LocalProtocolError if kind is OverflowError else kind
        )  # where there are two faults, either is found first
    assert results[0] == results[1]
