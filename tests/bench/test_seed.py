"""The seed workload's totals, and that all ways carry it rightly."""

from __future__ import annotations

import pytest
import torch

from bench.grids import seed_grids
from bench.results import SeedRun, Setting
from bench.seed import DOCUMENT
from bench.seed_contenders import Ready, check_arguments, check_result, check_whole_result, write_content
from bench.seed_pair import replay
from bench.seed_workload import KINDS, LAYERS, LM_HEAD, PATTERNS, QKV, received_bytes, sent_bytes

KIB, MIB = 1 << 10, 1 << 20


def test_the_originals_forward_is_98_calls_of_the_known_bytes() -> None:
    """3328 MiB and 16 KiB of ids and the last position are sent, 3656.5 MiB received."""
    assert len(PATTERNS["op"]) == 98 == 6 * LAYERS + 2
    assert sent_bytes("op", torch.float32) == 3328 * MIB + 16 * KIB
    assert round(received_bytes("op", torch.float32) / MIB, 1) == 3656.5


def test_the_other_patterns_have_their_calls() -> None:
    """As llama_split's splits."""
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


@pytest.mark.parametrize("name", ["doorbell, in place", "zmq, copy in", "original", "memcpy of the same bytes"])
def test_a_way_carries_the_workload(name: str) -> None:
    """Every word of every kind is compared, on both sides; the smallest patterns will do."""
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
    """An argument or a result with one other word, or of another size."""
    kind = KINDS.index(QKV)
    ready = Ready(lambda shape, dtype: torch.empty(shape, dtype=dtype))
    arguments = ready.arguments(kind, "bfloat16")
    check_arguments(kind, arguments)
    arguments[0][0, 3, 5] += 1
    with pytest.raises(RuntimeError, match="wrong argument"):
        check_arguments(kind, arguments)
    result = ready.result(kind, "bfloat16")
    check_whole_result(result, kind, "bfloat16")
    result[0, 3, 5] += 1
    with pytest.raises(RuntimeError, match="wrong words"):
        check_whole_result(result, kind, "bfloat16")
    with pytest.raises(RuntimeError, match="wrong result"):
        check_result(result, KINDS.index(LM_HEAD), "bfloat16")
    with pytest.raises(RuntimeError, match="wrong result"):
        check_result(result, kind, "float32")


def test_content_differs_between_places() -> None:
    """Two arguments that were swapped would be seen."""
    first, second = torch.empty(8, dtype=torch.int64), torch.empty(8, dtype=torch.int64)
    write_content(first, 1, 0)
    write_content(second, 1, 1)
    assert not torch.equal(first, second)


def test_the_documents_figures_stand_beside_the_originals_pattern() -> None:
    """And its total is the sum of its parts."""
    run = SeedRun(Setting({}, {}, {}), [DOCUMENT])
    (grid,) = seed_grids(run)
    assert grid.rows[0][0] == "the document's figures"
    assert grid.rows[0][1:5] == ("98", "332", "46.3", "25.5")
