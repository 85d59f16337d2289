"""``bench baseline``: the tensors of the original system's forward, over every way of carrying them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ..baseline.contenders import BASELINE_CONTENDERS
from ..baseline.measure import ReplayPlan, replay_rounds
from ..baseline.workload import DTYPES, PATTERNS
from ..contenders import matching
from ..harness.results import BaselineRun
from ..reports.tables import baseline_grids
from .options import (
    ContendersOption,
    DtypesOption,
    JsonOption,
    PlotOption,
    RoundsOption,
    SecondsOption,
    command_of,
    names_of,
)
from .output import keep, show

PatternsOption = Annotated[str, typer.Option(help="Call patterns, comma-separated; op is the original's.")]

_ALL_DTYPES, _ALL_PATTERNS = ",".join(DTYPES), ",".join(PATTERNS)


@dataclass(frozen=True)
class BaselineOptions:
    """The options of ``bench baseline``, as given."""

    contenders: ContendersOption = ""
    dtypes: DtypesOption = _ALL_DTYPES
    patterns: PatternsOption = _ALL_PATTERNS
    seconds: SecondsOption = 0.4
    rounds: RoundsOption = 2
    json_file: JsonOption = None
    plot: PlotOption = None

    def names(self) -> list[str]:
        """The contenders that were selected.

        Raises:
            typer.BadParameter: A part of a name matches none.
        """
        try:
            return matching(self.contenders, BASELINE_CONTENDERS)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error


@command_of(BaselineOptions)
def baseline(options: BaselineOptions) -> None:
    """Replay the original system's forward of 98 calls, and patterns with fewer calls: the transport only."""
    run_baseline(options)


def run_baseline(options: BaselineOptions) -> BaselineRun:
    """Measure, show and keep."""
    run = replay_rounds(
        ReplayPlan(
            dtypes=names_of(options.dtypes, DTYPES),
            patterns=names_of(options.patterns, PATTERNS),
            contenders=options.names(),
            seconds=options.seconds,
            rounds=options.rounds,
        )
    )
    show(run.setting, baseline_grids(run))
    keep(run, options.json_file, options.plot)
    return run
