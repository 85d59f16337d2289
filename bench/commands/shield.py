"""``bench shield``: what ``verify`` costs beside ``fused`` without it, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..engine.measure import DTYPES, MODELS
from ..harness.results import setting
from ..reports.grid import Grid, time_text
from .engine import ModelsOption, RepeatsOption, ThreadsOption
from .options import DtypesOption, command_of, names_of
from .output import show


@dataclass(frozen=True)
class ShieldOptions:
    """The options of ``bench shield``, as given."""

    models: ModelsOption = "smollm2"
    dtypes: DtypesOption = "float32,bfloat16,float16"
    tokens: Annotated[int, typer.Option(min=32, help="Length of the prompt.")] = 1024
    repeats: RepeatsOption = 5
    checks: Annotated[int, typer.Option(min=1, help="Rows of an honest worker to check.")] = 1_000_000
    threads: ThreadsOption = 2
    plot: Annotated[Path | None, typer.Option(help="The file for the plot of what is found. Default: none.")] = None


@command_of(ShieldOptions)
def shield(options: ShieldOptions) -> None:
    """Time prompts and tokens with and without verification, count false alarms, and show which errors are found."""
    from ..engine.shield import SIZES, ShieldJob, measure_shield  # it imports torch

    runs = [
        measure_shield(ShieldJob(model, dtype, options.tokens, options.repeats, options.checks, options.threads))
        for model in names_of(options.models, MODELS)
        for dtype in names_of(options.dtypes, DTYPES)
    ]
    about = setting([], tokens=options.tokens, repeats=options.repeats, threads=options.threads)
    costs = [
        (
            f"{run.model}, {run.dtype}",
            f"{run.load_s:.1f} s",
            *(time_text(seconds * 1e6) for seconds in (run.prefill.plain_s, run.prefill.verified_s)),
            f"{run.prefill.ratio:.3f}",
            *(time_text(seconds * 1e6) for seconds in (run.decode.plain_s, run.decode.verified_s)),
            f"{run.decode.ratio:.3f}",
        )
        for run in runs
    ]
    alarms = [(f"{run.model}, {run.dtype}", f"{run.checks}", f"{run.refused}", f"{run.largest:.3f}") for run in runs]
    found = [(f"{size:.1g}", *(f"{run.found[place]:.3f}" for run in runs)) for place, size in enumerate(SIZES)]
    names = tuple(f"{run.model}, {run.dtype}" for run in runs)
    show(
        about,
        [
            Grid(
                "fused without and with verify",
                ("", "load", "prompt", "verified", "ratio", "token", "verified", "ratio"),
                costs,
            ),
            Grid("An honest worker", ("", "rows checked", "refused", "largest difference / threshold"), alarms),
            Grid("Share of wrong rows that are found", ("error / length of the row", *names), found),
        ],
    )
    if options.plot is not None:
        from ..reports.plots import plot_found  # matplotlib takes a second to import

        plot_found(options.plot, SIZES, {name: run.found for name, run in zip(names, runs, strict=True)})
