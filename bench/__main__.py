"""``python -m bench latency``: round trips by size, of all contenders, in one run."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from typing import Annotated

import msgspec
import numpy as np
import torch
import typer
import zmq
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .contenders import CONTENDERS

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

_SIZES = "64,65536,1048576,16777216"


@app.callback()
def root() -> None:
    """Measure our transport beside others, in one run on this machine."""


@app.command()
def latency(
    sizes: Annotated[str, typer.Option(help="Tensor sizes in bytes, comma separated.")] = _SIZES,
    seconds: Annotated[float, typer.Option(help="How long to measure one contender at one size, per round.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds, against drift.")] = 3,
    json_file: Annotated[str | None, typer.Option("--json", help="Write every sample's summary here.")] = None,
) -> None:
    """A call with a tensor of N bytes, answered by a tensor of N bytes; content checked."""
    wanted = [int(size) for size in sizes.split(",")]
    samples: dict[tuple[str, int], list[float]] = {(name, size): [] for name in CONTENDERS for size in wanted}
    work = [key for _ in range(rounds) for key in samples]
    console = Console()
    for name, size in track(work, description="measuring", console=Console(stderr=True), transient=True):
        command = [sys.executable, "-m", "bench.pair", name, str(size), str(seconds)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        samples[name, size] += json.loads(output)["samples"]
    console.print(
        f"Python {platform.python_version()}, torch {torch.__version__}, pyzmq {zmq.__version__}, "
        f"msgspec {msgspec.__version__}, numpy {np.__version__}, {platform.machine()}, Linux {platform.release()}"
    )
    for size in wanted:
        console.print(_table(size, samples))
    if json_file is not None:
        with open(json_file, "w", encoding="utf-8") as file:
            json.dump([_summary(name, size, found) for (name, size), found in samples.items()], file, indent=1)


def _summary(name: str, size: int, found: list[float]) -> dict[str, object]:
    return {
        "name": name,
        "nbytes": size,
        "calls": len(found),
        "p50_us": statistics.median(found) * 1e6,
        "p99_us": statistics.quantiles(found, n=100)[98] * 1e6,
        "min_us": min(found) * 1e6,
    }


def _table(size: int, samples: dict[tuple[str, int], list[float]]) -> Table:
    table = Table(title=f"{size} bytes each way", title_justify="left")
    for title in ("contender", "copies", "calls", "min µs", "p50 µs", "p99 µs"):
        table.add_column(title, justify="left" if title == "contender" else "right")
    for name, contender in CONTENDERS.items():
        row = _summary(name, size, samples[name, size])
        figures = [f"{row[figure]:.1f}" for figure in ("min_us", "p50_us", "p99_us")]
        table.add_row(name, contender.copies, str(row["calls"]), *figures)
    return table


if __name__ == "__main__":
    app()
