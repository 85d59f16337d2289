"""Plots of runs, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot looks for a display

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..harness.results import BaselineRun, LatencyRun, ThroughputRun
from .grid import size_text

_COLOURS = {"ours": "C0", "peer": "C1", "floor": "C7"}
_BASELINE_GROUPS = {"original": "peer", "memcpy of the same bytes": "floor"}  # all others are ours
_STYLES = {"ours": ("-", 2.4), "peer": ("--", 1.2), "floor": (":", 1.2)}
_DPI = 120
_MARKERS = "osD^v<>ph*XP"


def plot(run: LatencyRun | ThroughputRun | BaselineRun, directory: Path) -> Path:
    """Plot a run into a file of the directory, named after the kind of run."""
    if isinstance(run, LatencyRun):
        return latency_plot(run, directory)
    return throughput_plot(run, directory) if isinstance(run, ThroughputRun) else baseline_plot(run, directory)


def latency_plot(run: LatencyRun, directory: Path) -> Path:
    """Plot median round trips by size, both axes logarithmic; floors without a tensor are horizontal lines."""
    figure, axes = plt.subplots(figsize=(11, 7.5), layout="constrained")
    sizes = sorted({row.nbytes for row in run.rows})
    for place, name in enumerate(dict.fromkeys(row.contender for row in run.rows)):
        line, width = _STYLES[run.contenders[name].group]
        rows = [row for row in run.rows if row.contender == name]
        marker = _MARKERS[place % len(_MARKERS)]
        if len(rows) == 1 and run.contenders[name].group == "floor":
            axes.axhline(rows[0].p50_us, linestyle=line, linewidth=width, color=f"C{place}", label=name)
            continue
        axes.plot(
            [row.nbytes for row in rows],
            [row.p50_us for row in rows],
            line,
            linewidth=width,
            color=f"C{place}",
            marker=marker,
            markersize=5,
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="tensor each way", ylabel="round trip, p50, µs")
    axes.set_xticks(sizes, [size_text(size) for size in sizes])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    return _save(figure, directory / "latency.png")


def plot_found(file: Path, sizes: Sequence[float], found: Mapping[str, Sequence[float]]) -> Path:
    """Plot which part of wrong rows is found by the size of the error, for each model and dtype."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for place, (name, shares) in enumerate(found.items()):
        axes.plot(sizes, shares, marker=_MARKERS[place % len(_MARKERS)], label=name)
    axes.set(xscale="log", xlabel="error / length of the row", ylabel="share of wrong rows that are found")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    return _save(figure, file)


def throughput_plot(run: ThroughputRun, directory: Path) -> Path:
    """Plot bytes per second, both ways together, at the largest size."""
    largest = max(row.nbytes for row in run.rows)
    rows = [row for row in run.rows if row.nbytes == largest]
    labels = [f"{row.contender} ({row.in_flight} in flight)" for row in rows]
    return _bars(
        labels,
        [row.bytes_per_s / 1e9 for row in rows],
        [run.contenders[row.contender].group for row in rows],
        f"GB/s both ways, tensors of {size_text(largest)}",
        directory / "throughput.png",
    )


def baseline_plot(run: BaselineRun, directory: Path) -> Path:
    """Plot the total transport time of a forward."""
    labels = [f"{row.contender}: {row.pattern}, {row.dtype}" for row in run.rows]
    groups = [_BASELINE_GROUPS.get(row.contender, "ours") for row in run.rows]
    title = "transport time of a forward of 1024 tokens, ms"
    return _bars(labels, [row.total_ms for row in run.rows], groups, title, directory / "baseline.png")


def _bars(labels: list[str], values: list[float], groups: list[str], title: str, path: Path) -> Path:
    """Horizontal bars on a logarithmic axis, the first on top; ours, peers and floors each have a colour."""
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.22 * len(labels)), layout="constrained")
    bars = axes.barh(range(len(labels)), values, color=[_COLOURS[group] for group in groups])
    texts = [f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values]
    axes.bar_label(bars, texts, padding=3, fontsize="small")
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel=title)
    axes.margins(x=0.1, y=0.01)
    axes.grid(visible=True, axis="x", alpha=0.3)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path
