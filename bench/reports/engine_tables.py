"""The tables of the engine: times of each split, and what it shows the worker.

The reference of a ratio is the faster of the unsplit model's two runs: with OpenMP's default and with passive threads.
"""

from __future__ import annotations

from collections.abc import Iterator

from llama_split.boundary.operations import REVEALED, Mode

from ..engine.job import UNSPLIT, UNSPLIT_PASSIVE
from ..harness.results import EngineRow, EngineRun
from .grid import Grid

UNKNOWN = "–"


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
    yield _cell(row.prefill_calls, "d")
    for length in prompts:
        yield f"{row.prefill_ms[length]:.1f}"
    for length in prompts:
        yield f"{row.prefill_ms[length] / min(one.prefill_ms[length] for one in unsplit):.2f}"
    yield _cell(row.prefill_mib.get(prompts[-1]), ".1f")
    yield f"{row.decode_p50_ms:.2f}"
    yield _cell(row.decode_p99_ms, ".2f")
    yield f"{1e3 / row.decode_p50_ms:.1f}"
    yield f"{row.decode_p50_ms / min(one.decode_p50_ms for one in unsplit):.2f}"
    yield _cell(row.decode_kib, ".0f")
    yield UNKNOWN if row.same_tokens is None else f"{row.same_tokens}/{row.tokens}"
    yield UNKNOWN if row.client_cpu_s is None else f"{row.client_cpu_s:.1f} + {_cell(row.worker_cpu_s, '.1f')}"


def _cell(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def revealed_grid() -> Grid:
    """What each mode shows the worker."""
    return Grid(
        "What the worker sees",
        ("split", "the worker sees"),
        [(mode.value, REVEALED[mode]) for mode in Mode],
        frozenset({"the worker sees"}),
    )
