"""How layers are divided among workers, and how a range of them is written."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_split.boundary.division import divide, layers_text, parse_layers
from llama_split.errors import LlamaSplitError


def largest(shares: list[range], layer_bytes: int, extras: list[int]) -> int:
    return max(len(share) * layer_bytes + extra for share, extra in zip(shares, extras, strict=True))


def every_division(layers: int, workers: int) -> list[list[range]]:
    """All ways to divide layers so that each worker gets one or more."""
    return [
        [range(first, end) for first, end in itertools.pairwise((0, *ends, layers))]
        for ends in itertools.combinations(range(1, layers), workers - 1)
    ]


@given(
    layers=st.integers(1, 9),
    layer_bytes=st.integers(1, 50),
    extras=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    data=st.data(),
)
def test_the_largest_share_is_as_small_as_the_limits_allow(
    layers: int, layer_bytes: int, extras: list[int], data: st.DataObject
) -> None:
    """Compared with all possible divisions: the best one, or an error where there is none."""
    limits = data.draw(st.tuples(*[st.none() | st.integers(1, 600) for _ in extras]))
    possible = [
        shares
        for shares in every_division(layers, len(extras))
        if all(
            limit is None or len(share) * layer_bytes + extra <= limit
            for share, extra, limit in zip(shares, extras, limits, strict=True)
        )
    ]
    if not possible:
        with pytest.raises(LlamaSplitError, match=r"workers can't share|the limits leave no room"):
            divide(layer_bytes, layers, extras, limits)
        return
    found = divide(layer_bytes, layers, extras, limits)
    assert found in possible
    assert largest(found, layer_bytes, extras) == min(largest(shares, layer_bytes, extras) for shares in possible)


@given(first=st.integers(0, 30), count=st.integers(1, 30))
def test_a_range_is_read_as_it_is_written(first: int, count: int) -> None:
    """First and last layer, both included."""
    held = range(first, first + count)
    assert parse_layers(layers_text(held), first + count) == held


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(
            (text, "write the first and the last, for example 0-15")
            for text in ("", "3", "-", "a-b", "-1-3", "0 - 3", "1-")
        ),
        *(
            (text, "layers of this model, which has 0-15")
            for text in ("0-16", "5-4", "16-16", "0-99999999999999999999")
        ),
    ],
)
def test_other_texts_are_refused(text: str, said: str) -> None:
    """The error shows the form, or the layers that there are."""
    with pytest.raises(LlamaSplitError, match=said):
        parse_layers(text, 16)
