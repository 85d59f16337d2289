"""``bench check``: ratios of this run beside stored ones."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ..contenders import CONTENDERS
from ..harness import runner
from ..reports.ratios import CHECK_SIZES, CHECKED, STORED, Measured, check_names, losses, measure_ratio, targets
from ..reports.tables import target_grid
from .options import RoundsOption, SecondsOption, command_of
from .output import show

UpdateOption = Annotated[bool, typer.Option("--update", help="Store this run's ratios instead of comparing them.")]
StoredOption = Annotated[
    Path, typer.Option(help="The file of stored ratios.", show_default="bench/reports/ratios.json")
]


@dataclass(frozen=True)
class CheckOptions:
    """The options of ``bench check``, as given."""

    seconds: SecondsOption = 0.3
    rounds: RoundsOption = 5
    update: UpdateOption = False
    stored: StoredOption = STORED


@command_of(CheckOptions)
def check(options: CheckOptions) -> None:
    """Compare ratios with the stored ones; fail if one is worse by more than the noise."""
    worse = run_check(options)
    for loss in worse:
        print(f"worse: {loss}", file=sys.stderr)
    raise typer.Exit(1 if worse else 0)


def run_check(options: CheckOptions) -> list[str]:
    """Measure and compare; a line for each loss.

    Raises:
        typer.BadParameter: There are no stored ratios.
    """
    if not options.update and not options.stored.exists():
        raise typer.BadParameter(f"{options.stored} does not exist; run with --update on an idle machine to create it")
    plan = runner.Plan(options.seconds, options.rounds)
    run = runner.latency([CONTENDERS[name] for name in check_names()], CHECK_SIZES, plan, idle_s=0.0)
    now = {one.title: found for one in CHECKED if (found := measure_ratio(one, run)) is not None}
    show(run.setting, [target_grid(targets(run, None))], run.skipped)
    if options.update:
        options.stored.write_bytes(msgspec.json.format(msgspec.json.encode(now), indent=1) + b"\n")
        return []
    return losses(msgspec.json.decode(options.stored.read_bytes(), type=dict[str, Measured]), now)
