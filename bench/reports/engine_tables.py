"""The tables of the engine: times of each split, and what it shows the worker.

The reference of a ratio is the faster of the unsplit model's two runs: with OpenMP's default and with passive threads.
"""

from __future__ import annotations

from collections.abc import Iterator

from llama_split.boundary.operations import REVEALED, Mode

from ..engine.job import UNSPLIT, UNSPLIT_PASSIVE
from ..harness.results import EngineRow, EngineRun
from .grid import Grid


def engine_grids(run: EngineRun) -> Iterator[Grid]:
    """A table for each model and dtype, in the order in which they were measured."""
    for model, dtype in dict.fromkeys((row.model, row.dtype) for row in run.rows):
        rows = [row for row in run.rows if (row.model, row.dtype) == (model, dtype)]
        prompts = list(rows[0].prefill_ms)
        header = ["split", "calls", *(f"prefill {length} ms" for length in prompts), *("/ unsplit" for _ in prompts)]
        header += [
            f"MiB prefill {prompts[-1]}",
            f"decode after {prompts[0]}, p50 ms",
            "p99 ms",
            "tokens/s",
            "/ unsplit",
            "KiB a token",
            "same tokens",
            "CPU s",
        ]
        yield Grid(
            f"{model}, {dtype}",
            tuple(header),
            [tuple(_cells(row, rows, prompts)) for row in rows],
            frozenset({"split"}),
        )


def _cells(row: EngineRow, rows: list[EngineRow], prompts: list[str]) -> Iterator[str]:
    unsplit = [one for one in rows if one.mode in (UNSPLIT, UNSPLIT_PASSIVE)]
    yield f"{row.mode} {row.channel}".strip()
    yield f"{row.prefill_calls}"
    for length in prompts:
        yield f"{row.prefill_ms[length]:.1f}"
    for length in prompts:
        yield f"{row.prefill_ms[length] / min(one.prefill_ms[length] for one in unsplit):.2f}"
    yield f"{row.prefill_mib[prompts[-1]]:.1f}"
    yield f"{row.decode_p50_ms:.2f}"
    yield f"{row.decode_p99_ms:.2f}"
    yield f"{1e3 / row.decode_p50_ms:.1f}"
    yield f"{row.decode_p50_ms / min(one.decode_p50_ms for one in unsplit):.2f}"
    yield f"{row.decode_kib:.0f}"
    yield f"{row.same_tokens}/{row.tokens}"
    yield f"{row.client_cpu_s:.1f} + {row.worker_cpu_s:.1f}"


def revealed_grid() -> Grid:
    """What each mode shows the worker."""
    return Grid(
        "What the worker sees",
        ("split", "the worker sees"),
        [(mode.value, REVEALED[mode]) for mode in Mode],
        frozenset({"the worker sees"}),
    )
