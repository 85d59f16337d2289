"""``llama-split info``: the figures of the original system, and those of a model that is really loaded."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llama_split.boundary.operations import PROMISES, REVEALED
from shmtransport.units import MIB
from tests.support.commands import Command, is_one_line_error

pytestmark = pytest.mark.timeout(150)

SHAPE = ("info", "--model", "llama-3.2-1b", "--random-weights")


def by_mode(printed: str) -> dict[str, dict[str, Any]]:
    return {one["mode"]: one for one in json.loads(printed)["modes"]}


def test_the_original_splits_figures_are_those_that_were_measured(command: Command) -> None:
    """Llama-3.2-1B in float32, a prompt of 1024 tokens: 98 calls, 3328.0 MiB sent (+ 16 KiB), 3656.5 MiB received."""
    done = command(*SHAPE, "--json")
    assert (done.code, done.err) == (0, "")
    modes = by_mode(done.out)
    assert list(modes) == ["op", "fused", "layer", "stack"]
    assert modes["op"]["prefill"]["calls"] == 98
    assert modes["op"]["prefill"]["bytes_sent"] == 3328 * MIB + 16 * 1024
    assert modes["op"]["prefill"]["bytes_received"] / MIB == pytest.approx(3656.5, abs=0.05)
    assert [modes[mode]["prefill"]["calls"] for mode in modes] == [98, 65, 17, 1]
    assert [modes[mode]["decode"]["calls"] for mode in modes] == [98, 65, 17, 1]
    assert [modes[mode]["kv_holder"] for mode in modes] == ["trusted", "trusted", "worker", "worker"]
    assert {one["kv_bytes_per_token"] for one in modes.values()} == {2 * 16 * 8 * 64 * 4}
    assert modes["stack"]["trusted_weight_bytes"] == 128256 * 2048 * 4
    assert {mode: one["worker_sees"] for mode, one in modes.items()} == {
        mode.value: text for mode, text in REVEALED.items()
    }
    assert json.loads(done.out)["shields"] == PROMISES


def test_the_table_shows_them(command: Command) -> None:
    """All modes side by side, or one; with what the worker sees."""
    done = command(*SHAPE)
    assert done.code == 0
    for text in (
        "98",
        "3328.0 MiB",
        "3656.5 MiB",
        "896.0 MiB",
        "fused",
        "stack",
        "The worker sees",
        "64.0 KiB",
        "otp",
        "2⁻³⁹",
    ):
        assert text in done.out
    one = command(*SHAPE, "--mode", "op")
    assert "3328.0 MiB" in one.out
    assert "stack" not in one.out


def test_the_division_among_workers_is_shown(command: Command) -> None:
    """As even as can be, or as the memory of each allows; a further call of stack for each further worker."""
    even = by_mode(command(*SHAPE, "--workers", "2", "--json").out)["stack"]
    assert [one["layers"] for one in even["workers"]] == ["0-9", "10-15"]
    assert (even["prefill"]["calls"], even["decode"]["calls"]) == (2, 2)
    limits = ("--max-weight-bytes", "1000000000", "--max-weight-bytes", "5000000000")
    uneven = by_mode(command(*SHAPE, "--mode", "stack", *limits, "--json").out)["stack"]
    assert [one["layers"] for one in uneven["workers"]] == ["0-3", "4-15"]
    assert all(one["weight_bytes"] <= int(limit) for one, limit in zip(uneven["workers"], limits[1::2], strict=True))
    assert sum(one["weight_bytes"] for one in uneven["workers"]) == uneven["worker_weight_bytes"]
    table = command(*SHAPE, "--workers", "2").out
    assert "worker 2" in table
    assert "10-15" in table


def test_dtypes_and_lengths_count(command: Command) -> None:
    """Half the bytes on the wire in bfloat16, whatever is computed in; twice the tokens, twice the hidden states."""
    whole, half, longer = (
        by_mode(command(*SHAPE, "--mode", "layer", "--json", *options).out)["layer"]
        for options in ((), ("--wire-dtype", "bfloat16"), ("--prefill", "2048"))
    )
    positions = 8 * 1024
    assert half["prefill"]["bytes_sent"] - positions == (whole["prefill"]["bytes_sent"] - positions) / 2
    assert half["worker_weight_bytes"] == whole["worker_weight_bytes"]
    assert longer["prefill"]["bytes_sent"] - positions == pytest.approx(2 * whole["prefill"]["bytes_sent"], rel=1e-3)
    halved = by_mode(command(*SHAPE, "--mode", "layer", "--json", "--dtype", "bfloat16").out)["layer"]
    assert halved["prefill"] == half["prefill"]
    assert 2 * halved["worker_weight_bytes"] == whole["worker_weight_bytes"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--mode", "magic"), "'magic' is not supported"),
        (("--dtype", "int8"), "int8 is not supported"),
        (("--wire-dtype", "int4"), "int4 is not supported"),
        (("--workers", "17"), "17 workers can't share 16 layers"),
        (("--workers", "2", "--max-weight-bytes", "2000000000"), "the limits leave no room for 16 layers"),
        (("--workers", "3", "--max-weight-bytes", "1", "--max-weight-bytes", "2"), "is given 2 times for --workers 3"),
        (("--prefill", "131072"), "leaves no position for a decode step: the model has 131072"),
        (("--prefill", "0"), "Invalid value for '--prefill'"),
    ],
)
def test_a_bad_option_is_one_line(command: Command, options: tuple[str, ...], reason: str) -> None:
    """The line says which values are allowed."""
    done = command(*SHAPE, *options)
    assert is_one_line_error(done), done
    assert reason in done.err
