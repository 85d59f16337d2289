"""The commands of ``python -m bench``: a dataclass of options each, and presets, which are such options chosen here."""

from __future__ import annotations

import typer

from .baseline import baseline
from .check import check
from .engine import engine
from .gpu import gpu
from .masked import masked
from .presets import engine_all, everything, quick
from .report import report
from .round_trips import latency, throughput
from .sharing import sharing
from .shield import shield

_PRESETS = "Presets"

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Measure our transport beside others on this machine, all in one run."""


for command in (latency, throughput, baseline, engine, gpu, sharing, shield, masked, check, report):
    app.command()(command)
app.command("seed", hidden=True)(baseline)  # the former name
app.command("all", rich_help_panel=_PRESETS)(everything)
app.command(rich_help_panel=_PRESETS)(quick)
app.command("engine-all", rich_help_panel=_PRESETS)(engine_all)
