"""``bench gpu``: copies between arenas and a GPU beside torch's, and tensors that stay there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ..harness.results import setting
from ..reports.grid import Grid, size_text, time_text
from .options import command_of
from .output import show


@dataclass(frozen=True)
class GpuOptions:
    """The options of ``bench gpu``, as given."""

    device: Annotated[str, typer.Option(help="The GPU, of server and client.")] = "cuda:0"
    calls: Annotated[int, typer.Option(min=10, help="Calls of each size.")] = 1000
    copies: Annotated[int, typer.Option(min=3, help="Copies in each direction.")] = 30


@command_of(GpuOptions)
def gpu(options: GpuOptions) -> None:
    """Time copies between pinned arenas and a GPU, and calls with tensors on the GPU; ends at once without one."""
    from ..device.measure import Unavailable, measure_gpu  # it imports torch

    try:
        found = measure_gpu(options.device, options.calls, options.copies)
    except Unavailable as error:
        typer.echo(f"skipped: {error}")
        return
    about = setting([], gpu=found.gpu, server=found.server_path, client=found.client_path)
    copied = [
        (one.direction, time_text(one.ours_us), time_text(one.torch_us), f"{one.ratio:.2f}") for one in found.copied
    ]
    called = [(size_text(one.nbytes), time_text(one.p50_us), time_text(one.p99_us)) for one in found.called]
    header = ("128 MiB", "arena", "torch, pinned", "bandwidth / torch's")
    show(
        about,
        [
            Grid("Copies between arenas and the GPU", header, copied),
            Grid("Calls with a tensor on the GPU each way", ("size", "p50", "p99"), called),
        ],
    )
