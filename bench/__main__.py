"""``python -m bench``: latency, throughput, seed, check and report; every run is one on this machine, side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from llama_split.operations import Mode
from shmtransport import CHANNEL_KINDS

from . import grids, runner
from .contenders import CONTENDERS, Contender
from .content import words
from .engine import MODELS, engine_grids, revealed_grid
from .engine import engine as run_engine
from .ratios import CHECK_SIZES, CHECKED, STORED, Measured, check_names, losses, measured, targets
from .report import write_report
from .results import EngineRun, Run, read, write
from .seed import seed as run_seed
from .seed_contenders import SEED_CONTENDERS
from .seed_workload import DTYPES, PATTERNS

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

_LATENCY_SIZES = "64,65536,1048576,8388608,134217728"
_WIDTH = 150
_THROUGHPUT_SIZES = "64,1048576,67108864"

Contenders = Annotated[str, typer.Option(help="Parts of names, comma separated; all if empty.")]
Sizes = Annotated[str, typer.Option(help="Bytes of a tensor, multiples of 8 from 64 on, comma separated.")]
Seconds = Annotated[float, typer.Option(help="How long to measure each, per round.")]
Rounds = Annotated[int, typer.Option(help="Interleaved rounds, against drift.")]
Pin = Annotated[bool, typer.Option("--pin", help="Give client and server a core each.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write what was found here.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Write a picture into this directory.")]


@app.callback()
def root() -> None:
    """Measure our transport beside others, in one run on this machine."""


@app.command()
def latency(
    contenders: Contenders = "",
    sizes: Sizes = _LATENCY_SIZES,
    seconds: Seconds = 0.4,
    rounds: Rounds = 3,
    pin: Pin = False,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """A call with a tensor of N bytes, answered by a tensor of N bytes; content checked."""
    run = runner.latency(_chosen(contenders), _sizes(sizes), runner.Plan(seconds, rounds, pin))
    tables = [*grids.latency_grids(run), grids.overview_grid(run), grids.target_grid(targets(run, None))]
    _show(grids.setting_text(run.setting), tables, run.skipped)
    _keep(run, json_file, plot)


@app.command()
def throughput(
    contenders: Contenders = "",
    sizes: Sizes = _THROUGHPUT_SIZES,
    seconds: Seconds = 0.4,
    rounds: Rounds = 2,
    pin: Pin = False,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """The same with as many calls under way as each contender can, making and checking of tensors included."""
    run = runner.throughput(_chosen(contenders, moving_only=True), _sizes(sizes), runner.Plan(seconds, rounds, pin))
    _show(grids.setting_text(run.setting), [grids.throughput_grid(run)], run.skipped)
    _keep(run, json_file, plot)


@app.command()
def seed(
    contenders: Contenders = "",
    dtypes: Annotated[str, typer.Option(help="Comma separated.")] = ",".join(DTYPES),
    patterns: Annotated[str, typer.Option(help="Comma separated.")] = ",".join(PATTERNS),
    seconds: Seconds = 0.4,
    rounds: Rounds = 2,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """The original's forward of 98 calls, and the patterns with fewer, as transport only."""
    names = [name for name in SEED_CONTENDERS if not contenders or any(part in name for part in contenders.split(","))]
    run = run_seed(_known(dtypes, DTYPES), _known(patterns, PATTERNS), names, seconds, rounds)
    _show(grids.setting_text(run.setting), grids.seed_grids(run), {})
    _keep(run, json_file, plot)


@app.command()
def engine(
    models: Annotated[str, typer.Option(help="Comma separated: smollm2, or shapes with random weights.")] = (
        "smollm2,llama-3.2-1b"
    ),
    dtypes: Annotated[str, typer.Option(help="Comma separated.")] = "float32,bfloat16",
    modes: Annotated[str, typer.Option(help="Comma separated.")] = ",".join(mode.value for mode in Mode),
    channels: Annotated[str, typer.Option(help="Comma separated.")] = "zmq,doorbell",
    prompts: Annotated[str, typer.Option(help="Lengths in tokens, comma separated.")] = "128,1024",
    new_tokens: Annotated[int, typer.Option(min=3, help="How many tokens to generate.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Forwards of each prompt.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of each process.")] = 2,
    spin_us: Annotated[
        float, typer.Option(help="How long the worker looks for a call before it waits (doorbell).")
    ] = 0.0,
    json_file: Json = None,
) -> None:
    """The splits beside the unsplit transformers model: prompts and generated tokens."""
    run = run_engine(
        _known(models, MODELS),
        _known(dtypes, ("float32", "bfloat16", "float16")),
        _known(modes, [mode.value for mode in Mode]),
        _known(channels, CHANNEL_KINDS),
        [int(length) for length in prompts.split(",")],
        new_tokens,
        repeats,
        threads,
        spin_us,
    )
    _show(grids.setting_text(run.setting), [*engine_grids(run), revealed_grid()], {})
    _keep(run, json_file, None)


@app.command()
def check(
    seconds: Seconds = 0.3,
    rounds: Rounds = 5,
    update: Annotated[bool, typer.Option("--update", help="Store what is measured now instead.")] = False,
    stored: Annotated[Path, typer.Option(help="Where the stored ratios are.")] = STORED,
) -> None:
    """Compare ratios with the stored ones; fail on a loss that is beyond the noise."""
    if not update and not stored.exists():
        raise typer.BadParameter(f"{stored} is not there: make it with --update, on a quiet machine")
    kinds = [CONTENDERS[name] for name in check_names()]
    run = runner.latency(kinds, CHECK_SIZES, runner.Plan(seconds, rounds), idle_s=0.0)
    now = {one.title: found for one in CHECKED if (found := measured(one, run)) is not None}
    _show(grids.setting_text(run.setting), [grids.target_grid(targets(run, None))], run.skipped)
    if update:
        stored.write_bytes(msgspec.json.format(msgspec.json.encode(now), indent=1) + b"\n")
        return
    worse = losses(msgspec.json.decode(stored.read_bytes(), type=dict[str, Measured]), now)
    for loss in worse:
        print(f"worse: {loss}", file=sys.stderr)
    raise typer.Exit(1 if worse else 0)


@app.command()
def report(
    files: Annotated[list[Path] | None, typer.Argument(help="What --json has written.")] = None,
    document: Annotated[Path, typer.Option(help="Markdown with <!-- bench:… --> markers.")] = Path(
        "docs/benchmarks.md"
    ),
) -> None:
    """Write the tables of runs into the document."""
    write_report(document, [read(path) for path in files or ()])


def _chosen(contenders: str, moving_only: bool = False) -> list[type[Contender]]:
    try:
        return runner.chosen(contenders, moving_only)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(size) for size in text.split(",")]
        for size in sizes:
            words(size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return sizes


def _known(text: str, known: Iterable[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}")
    return names


def _show(setting: str, tables: Iterable[grids.Grid], skipped: dict[str, str]) -> None:
    console = Console()
    if not console.is_terminal:  # a log or a pipe
        console = Console(width=_WIDTH)
    console.print(setting)
    for grid in tables:
        console.print(grids.to_rich(grid))
    if skipped:
        console.print(grids.to_rich(grids.skipped_grid(skipped)))


def _keep(run: Run, json_file: Path | None, plot: Path | None) -> None:
    if json_file is not None:
        write(json_file, run)
    if plot is not None and not isinstance(run, EngineRun):
        from .plots import picture  # matplotlib takes a second to import

        print(f"wrote {picture(run, plot)}", file=sys.stderr)


if __name__ == "__main__":
    app()
