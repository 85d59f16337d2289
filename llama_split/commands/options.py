"""Options that several commands share, and what follows from them. Nothing here imports torch before it is needed."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checkpoint.demo import demo_model
from ..errors import LlamaSplitError
from .settings import MODEL_VARIABLE, Settings

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

MOST_THREADS = 1024

ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Directory, .gguf file, hub id or, with --random-weights, a shape. "
        "Default: $LLAMA_MODEL_PATH, then the demo's model."
    ),
]
RandomOption = Annotated[
    bool,
    typer.Option("--random-weights", help="--model names a shape: llama-3.2-1b, llama-3.1-8b, tinyllama-1.1b."),
]
SeedOption = Annotated[int, typer.Option(help="Seed for random weights; must match the other side's.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16: weights and arithmetic. Default: $LLAMA_DTYPE, then float32."),
]
WireDtypeOption = Annotated[
    str | None, typer.Option(help="Dtype of the activations that cross to the worker. Default: --dtype's.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where the worker computes: cpu, cuda:0. Default: $LLAMA_GPU_DEVICE, then cpu.")
]
NewTokensOption = Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Log what both processes do.")]


@dataclass(frozen=True)
class SplitOptions:
    """Which model, how it is split, and which worker; as given, before the environment and defaults."""

    model: ModelOption = None
    mode: Annotated[
        str,
        typer.Option(
            help="op (attention's products are offloaded too), fused (attention and KV stay here), "
            "layer or stack (the worker has them); `llama-split info` compares them."
        ),
    ] = "fused"
    dtype: DtypeOption = None
    wire_dtype: WireDtypeOption = None
    worker: Annotated[
        list[str] | None,
        typer.Option(
            help="Address of a running worker; several times for workers that share the layers, in the order of these. "
            "Default: $LLAMA_IPC_PATH; without either, one is started.",
        ),
    ] = None
    device: DeviceOption = None


@dataclass(frozen=True)
class AdvancedOptions:
    """What most users leave alone: transport, threads and random weights."""

    channel: Annotated[str, typer.Option(help="zmq, or doorbell: shared memory and a futex, which is faster.")] = "zmq"
    pipeline: Annotated[
        int,
        typer.Option(
            help="Split a prompt so that up to this many chunks are in flight at once at a worker, and all sides "
            "compute at the same time; multiplies the number of calls. For workers that don't compute on this side's "
            "cores; in layer and stack for several workers.",
        ),
    ] = 1
    shield: Annotated[
        str,
        typer.Option(
            help="What stands between the model and the worker: none; verify, which checks every result, in op and "
            "fused; otp, which also hides what is sent, in fused, from a worker with --dtype int8; others by packages "
            "that register one."
        ),
    ] = "none"
    masks: Annotated[
        str | None,
        typer.Option(
            help="The file of masks for --shield otp that `llama-split deal` has made. Default: this process deals."
        ),
    ] = None
    arena_bytes: Annotated[int | None, typer.Option(min=1, help="Size of each arena. Default: by the model.")] = None
    connect_timeout_s: Annotated[
        float,
        typer.Option(
            min=0.0, help="Seconds to wait for the worker at --worker, which may still be loading its weights."
        ),
    ] = 30.0
    reconnect: Annotated[
        bool,
        typer.Option(
            "--reconnect/--no-reconnect",
            help="When the worker is lost, connect again, and restart it if this command started it; the tokens stay "
            "the same.",
        ),
    ] = True
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_THREADS,
            help="Threads that torch computes with in this process, and in a worker that this command starts. The two "
            "compute in turn, so each may use all cores; idle threads sleep instead of spinning "
            "(OMP_WAIT_POLICY=PASSIVE, unless it is set). Default: torch's, one per core.",
        ),
    ] = None
    random_weights: RandomOption = False
    seed: SeedOption = 0


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest, or at random with a temperature above 0.

    Raises:
        LlamaSplitError: the temperature is not finite, or there are options of sampling without one, which have no
            effect.
    """

    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Above 0: sample, the more freely the higher. Default: greedy.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this total probability.")
    ] = None
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this many of the likeliest tokens.")] = None
    seed_sampling: Annotated[
        int | None, typer.Option(help="Random seed for sampling. Default: different in every run.")
    ] = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not math.isfinite(self.temperature):
            raise LlamaSplitError(f"--temperature {self.temperature} is not finite: pass a number of 0 or more")
        given = {"--top-p": self.top_p, "--top-k": self.top_k, "--seed-sampling": self.seed_sampling}
        useless = [name for name, value in given.items() if value is not None]
        if useless and not self.temperature:
            raise LlamaSplitError(
                f"{' and '.join(useless)} would have no effect: tokens are sampled only with --temperature above 0"
            )

    def seed_generator(self) -> None:
        """Seed torch's generator; without ``seed_sampling``, differently in every run."""
        import torch

        if self.seed_sampling is None:
            torch.seed()  # every process starts in the same state
        else:
            torch.manual_seed(self.seed_sampling)

    def arguments(self) -> dict[str, Any]:
        """These options as settings of transformers' generation."""
        if not self.temperature:
            return {"do_sample": False}
        limits = {"top_p": self.top_p, "top_k": self.top_k}
        chosen = {name: value for name, value in limits.items() if value is not None}
        return {"do_sample": True, "temperature": self.temperature, **chosen}


def model_name(settings: Settings, model: str | None) -> str:
    """The model that was named by option or environment, else the demo's.

    Raises:
        CheckpointError: none was named, and the demo's is not installed.
    """
    chosen = settings.pick(model, MODEL_VARIABLE, None)
    return str(demo_model()) if chosen is None else chosen


def open_model(name: str, seed: int | None) -> Checkpoint:
    """Open a model; with a seed, one with random weights whose shape has this name.

    Raises:
        CheckpointError: there is no such model, or none that can be split.
    """
    if seed is not None:
        from ..checkpoint.synthetic import RandomCheckpoint

        return RandomCheckpoint(name, seed)
    from ..checkpoint import open_checkpoint

    return open_checkpoint(name)


def limit_threads(threads: int | None) -> None:
    """Set the number of threads that torch computes with; None leaves it as it is."""
    if threads is None:
        return
    os.environ["OMP_NUM_THREADS"] = str(threads)  # torch reads it when imported, for threads that start later
    import torch

    torch.set_num_threads(threads)
