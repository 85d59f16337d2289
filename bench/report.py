"""Writes the tables of runs into a Markdown document, between markers that name them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from . import grids
from .engine import engine_grids, revealed_grid
from .ratios import targets
from .results import EngineRun, LatencyRun, Run, SeedRun, ThroughputRun


def report(document: str, runs: Iterable[Run]) -> str:
    """The document with each ``<!-- bench:NAME -->`` section whose run is given written anew.

    Raises:
        ValueError: the document lacks a section.
    """
    runs = list(runs)
    latency = next((run for run in runs if isinstance(run, LatencyRun)), None)
    throughput = next((run for run in runs if isinstance(run, ThroughputRun)), None)
    seed = next((run for run in runs if isinstance(run, SeedRun)), None)
    sections = {"method": grids.to_markdown(grids.method_grid())}
    if latency is not None:
        tables = [grids.overview_grid(latency), *grids.latency_grids(latency)]
        if latency.skipped:
            tables.append(grids.skipped_grid(latency.skipped))
        sections["latency"] = _section(grids.setting_text(latency.setting), tables)
    if throughput is not None:
        sections["throughput"] = _section(grids.setting_text(throughput.setting), [grids.throughput_grid(throughput)])
    if seed is not None:
        sections["seed"] = _section(grids.setting_text(seed.setting), grids.seed_grids(seed))
    if latency is not None or seed is not None:
        sections["targets"] = grids.to_markdown(grids.target_grid(targets(latency, seed)))
    engines = [run for run in runs if isinstance(run, EngineRun)]
    if engines:  # several: models of different sizes are measured with different prompts
        parts = [_section(grids.setting_text(run.setting), engine_grids(run)) for run in engines]
        sections["engine"] = "\n".join([*parts, grids.to_markdown(revealed_grid())])
    for name, text in sections.items():
        document = _replaced(document, name, text)
    return document


def write_report(path: Path, runs: Iterable[Run]) -> None:
    """Write the sections of a file anew."""
    path.write_text(report(path.read_text(encoding="utf-8"), runs), encoding="utf-8")


def _section(setting: str, tables: Iterable[grids.Grid]) -> str:
    return "\n".join([setting, "", *(grids.to_markdown(grid) for grid in tables)])


def _replaced(document: str, name: str, text: str) -> str:
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    written, count = pattern.subn(lambda _: f"{begin}\n{text}\n{end}", document)
    if count != 1:
        raise ValueError(f"the document has {count} sections between {begin} and {end}, not one")
    return written
