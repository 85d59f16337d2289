"""``bench engine``: llama_split's splits beside the unsplit transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from llama_split.boundary.operations import Mode
from shmtransport import CHANNEL_KINDS

from ..engine.measure import DTYPES, MODELS, EnginePlan, measure_engine
from ..harness.results import EngineRun
from ..reports.engine_tables import engine_grids, revealed_grid
from .options import DtypesOption, JsonOption, command_of, integers_of, names_of
from .output import keep, show

ModelsOption = Annotated[
    str, typer.Option(help="Models, comma-separated: smollm2, or shapes, which get random weights.")
]
ModesOption = Annotated[str, typer.Option(help="Splits, comma-separated.")]
ChannelsOption = Annotated[str, typer.Option(help="Channels, comma-separated.")]
PromptsOption = Annotated[str, typer.Option(help="Lengths of prompts in tokens, comma-separated.")]
NewTokensOption = Annotated[int, typer.Option(min=3, help="Tokens to generate.")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Forwards of each prompt.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Threads that each process computes with.")]
SpinOption = Annotated[
    float, typer.Option(min=0.0, help="Microseconds for which the worker spins before it blocks, on the doorbell.")
]
PeersOption = Annotated[bool, typer.Option(help="Run llama.cpp too, alone and with its RPC server, where it is found.")]

DeviceOption = Annotated[str, typer.Option(help="Where workers and the unsplit model compute: cpu, cuda:0.")]

_ALL_MODES = ",".join(mode.value for mode in Mode)


@dataclass(frozen=True)
class EngineOptions:
    """The options of ``bench engine``, as given."""

    models: ModelsOption = "smollm2,llama-3.2-1b"
    dtypes: DtypesOption = "float32,bfloat16"
    modes: ModesOption = _ALL_MODES
    channels: ChannelsOption = "zmq,doorbell"
    prompts: PromptsOption = "128,1024"
    new_tokens: NewTokensOption = 128
    repeats: RepeatsOption = 3
    threads: ThreadsOption = 2
    spin_us: SpinOption = 0.0
    peers: PeersOption = True
    device: DeviceOption = "cpu"
    json_file: JsonOption = None

    def plan(self) -> EnginePlan:
        """What they ask for.

        Raises:
            typer.BadParameter: A value is unknown.
        """
        return EnginePlan(
            models=names_of(self.models, MODELS),
            dtypes=names_of(self.dtypes, DTYPES),
            modes=names_of(self.modes, [mode.value for mode in Mode]),
            channels=names_of(self.channels, CHANNEL_KINDS),
            prompts=integers_of(self.prompts),
            new_tokens=self.new_tokens,
            repeats=self.repeats,
            threads=self.threads,
            spin_us=self.spin_us,
            peers=self.peers and self.device == "cpu",
            device=self.device,
        )


@command_of(EngineOptions)
def engine(options: EngineOptions) -> None:
    """Time prompts and generated tokens of every split, beside the unsplit transformers model."""
    run_engine(options)


def run_engine(options: EngineOptions) -> EngineRun:
    """Measure, show and keep."""
    run = measure_engine(options.plan())
    show(run.setting, [*engine_grids(run), revealed_grid()], run.skipped)
    keep(run, options.json_file)
    return run
