"""``bench sharing``: two workers that share a model's layers, and the bound that the slower one sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ..harness.results import setting
from ..reports.grid import Grid
from .options import command_of, integers_of, names_of
from .output import show


@dataclass(frozen=True)
class SharingOptions:
    """The options of ``bench sharing``, as given."""

    modes: Annotated[str, typer.Option(help="Splits, comma-separated: layer, stack.")] = "layer,stack"
    pipelines: Annotated[str, typer.Option(help="Chunks in flight at once at a worker, comma-separated.")] = "2,4,8"
    tokens: Annotated[int, typer.Option(min=32, help="Length of the prompt.")] = 1024
    repeats: Annotated[int, typer.Option(min=1, help="Forwards of each.")] = 5


@command_of(SharingOptions)
def sharing(options: SharingOptions) -> None:
    """Time a prompt over two workers with a core each, beside the bound that the slower one sets."""
    from ..engine.sharing import measure_sharing  # it imports torch

    modes = names_of(options.modes, ("layer", "stack"))
    pipelines = integers_of(options.pipelines)
    about = setting([], tokens=options.tokens, repeats=options.repeats)
    rows = [
        (
            found.mode,
            str(found.chunks),
            *(f"{seconds:.2f} s" for seconds in (*found.workers, found.in_turn, found.together)),
            f"{found.ratio:.2f}",
        )
        for found in measure_sharing(modes, pipelines, options.tokens, options.repeats)
    ]
    header = ("mode", "chunks", "worker 1", "worker 2", "in turn", "together", "together / slower worker")
    show(about, [Grid(f"A prompt of {options.tokens} tokens over two workers", header, rows)])
