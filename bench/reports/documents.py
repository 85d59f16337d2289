"""Writes the tables of runs into Markdown documents, between markers that name the sections."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..harness.results import BaselineRun, EngineRun, LatencyRun, Run, Setting, ThroughputRun
from . import tables
from .engine_tables import engine_grids, revealed_grid
from .grid import Grid, setting_text, to_markdown
from .ratios import targets


def fill_documents(documents: Sequence[str], runs: Iterable[Run]) -> list[str]:
    """Fill the ``<!-- bench:NAME -->`` sections of some documents with what the runs have for them.

    Raises:
        ValueError: A section that the runs have figures for is in none of the documents, or there more than once.
    """
    filled = list(documents)
    for name, text in _sections(list(runs)).items():
        filled = _with_section(filled, name, text)
    return filled


def write_documents(paths: Sequence[Path], runs: Iterable[Run]) -> None:
    """Fill the sections of some files; see ``fill_documents``."""
    filled = fill_documents([path.read_text(encoding="utf-8") for path in paths], runs)
    for path, text in zip(paths, filled, strict=True):
        path.write_text(text, encoding="utf-8")


def _sections(runs: list[Run]) -> dict[str, str]:
    """The sections that these runs have figures for, by name."""
    latency = next((run for run in runs if isinstance(run, LatencyRun)), None)
    throughput = next((run for run in runs if isinstance(run, ThroughputRun)), None)
    baseline = next((run for run in runs if isinstance(run, BaselineRun)), None)
    engines = [run for run in runs if isinstance(run, EngineRun)]
    sections = {"method": to_markdown(tables.method_grid())}
    if latency is not None:
        skipped = tables.skipped_grids(latency.skipped)
        sections["overview"] = _section(latency.setting, [tables.overview_grid(latency)])
        sections["latency"] = _section(latency.setting, [*tables.latency_grids(latency), *skipped])
    if throughput is not None:
        sections["throughput"] = _section(throughput.setting, [tables.throughput_grid(throughput)])
    if baseline is not None:
        sections["baseline"] = _section(baseline.setting, tables.baseline_grids(baseline))
    if latency is not None or baseline is not None:
        sections["targets"] = to_markdown(tables.target_grid(targets(latency, baseline)))
    if engines:  # several, since models of different sizes are measured with different prompts
        sections["engine"] = "\n".join(
            [
                *(_section(run.setting, [*engine_grids(run), *tables.skipped_grids(run.skipped)]) for run in engines),
                to_markdown(revealed_grid()),
            ]
        )
    return sections


def _section(setting: Setting, grids: Iterable[Grid]) -> str:
    return "\n".join([setting_text(setting), "", *(to_markdown(grid) for grid in grids)])


def _with_section(documents: Sequence[str], name: str, text: str) -> list[str]:
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    written = [pattern.subn(lambda _: f"{begin}\n{text}\n{end}", document) for document in documents]
    count = sum(found for _, found in written)
    if count != 1:
        raise ValueError(f"the documents have {count} sections between {begin} and {end}; there must be exactly one")
    return [document for document, _ in written]
