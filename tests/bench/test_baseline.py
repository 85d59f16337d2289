"""The baseline: the bytes of its calls, and that every contender carries them correctly."""

from __future__ import annotations

import pytest
import torch

from bench.baseline.contenders import ReadyTensors, private_empty
from bench.baseline.content import check_arguments, check_result, check_whole_result, write_content
from bench.baseline.measure import ORIGINAL_PROFILE
from bench.baseline.pair import replay
from bench.baseline.workload import LAYERS, LM_HEAD, OPERATIONS, PATTERNS, QKV, received_bytes, sent_bytes
from bench.harness.results import BaselineRun, Setting
from bench.reports.tables import baseline_grids
from shmtransport.units import KIB, MIB


def test_the_originals_forward_is_98_calls_of_the_known_bytes() -> None:
    """3328 MiB and 16 KiB of ids and the last position are sent, 3656.5 MiB received."""
    assert len(PATTERNS["op"]) == 98 == 6 * LAYERS + 2
    assert sent_bytes("op", torch.float32) == 3328 * MIB + 16 * KIB
    assert round(received_bytes("op", torch.float32) / MIB, 1) == 3656.5


def test_the_other_patterns_have_their_calls() -> None:
    """As many as llama_split's modes make."""
    assert {name: len(calls) for name, calls in PATTERNS.items()} == {
        "op": 6 * LAYERS + 2,
        "fused": 4 * LAYERS + 1,
        "layer": LAYERS + 1,
        "stack": 1,
    }


def test_bfloat16_halves_all_but_the_ids() -> None:
    """Token ids stay int64."""
    ids = 8 * KIB
    assert sent_bytes("op", torch.bfloat16) - ids == (sent_bytes("op", torch.float32) - ids) // 2
    assert received_bytes("op", torch.bfloat16) == received_bytes("op", torch.float32) // 2


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize("name", ["doorbell, in place", "zmq, copy in", "original", "memcpy of the same bytes"])
def test_a_contender_carries_the_workload(name: str) -> None:
    """Both sides compare every word; the smallest pattern is enough."""
    rows = replay(name, ["float32", "bfloat16"], ["stack"], 0.0)
    assert [(row.dtype, row.pattern, len(row.total_s)) for row in rows] == [
        ("float32", "stack", 1),
        ("bfloat16", "stack", 1),
    ]
    for row, dtype in zip(rows, (torch.float32, torch.bfloat16), strict=True):
        tensors = sent_bytes("stack", dtype) + received_bytes("stack", dtype)
        assert tensors <= row.zmq_bytes + row.shm_bytes < tensors + 500
        assert (row.zmq_bytes > tensors) == (name == "original")


def test_wrong_content_is_detected() -> None:
    """An argument or a result with one word changed, or of another size."""
    operation = OPERATIONS.index(QKV)
    ready = ReadyTensors(private_empty)
    arguments = ready.arguments(operation, "bfloat16")
    check_arguments(operation, arguments)
    arguments[0][0, 3, 5] += 1
    with pytest.raises(RuntimeError, match="wrong argument"):
        check_arguments(operation, arguments)
    result = ready.result(operation, "bfloat16")
    check_whole_result(result, operation, "bfloat16")
    result[0, 3, 5] += 1
    with pytest.raises(RuntimeError, match="wrong words"):
        check_whole_result(result, operation, "bfloat16")
    with pytest.raises(RuntimeError, match="wrong result"):
        check_result(result, OPERATIONS.index(LM_HEAD), "bfloat16")
    with pytest.raises(RuntimeError, match="wrong result"):
        check_result(result, operation, "float32")


def test_content_differs_between_places() -> None:
    """Swapped arguments are noticed."""
    first, second = torch.empty(8, dtype=torch.int64), torch.empty(8, dtype=torch.int64)
    write_content(first, 1, 0)
    write_content(second, 1, 1)
    assert not torch.equal(first, second)


def test_the_originals_profile_is_shown_with_its_pattern() -> None:
    """Its row comes first in the table of pattern op in float32."""
    run = BaselineRun(Setting({}, {}, {}), [ORIGINAL_PROFILE])
    (grid,) = baseline_grids(run)
    assert grid.rows[0][0] == "the original's own profile"
    assert grid.rows[0][1:5] == ("98", "332", "46.3", "25.5")
    assert grid.rows[0][7] == "39.6 s"  # 98 times their sum
