"""Options that several commands share, and what follows from them; nothing here imports torch before it is needed."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import LlamaSplitError
from ..settings import MODEL_VARIABLE, Settings, demo_model

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
SeedOption = Annotated[int, typer.Option(help="Of random weights; the same on both sides.")]
ModeOption = Annotated[
    str,
    typer.Option(
        help="op (attention's products are the worker's too), fused (attention and KV stay here), "
        "layer or stack (they are the worker's); `llama-split info` compares them."
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16: weights and arithmetic. Default: $LLAMA_DTYPE, then float32."),
]
WireDtypeOption = Annotated[
    str | None, typer.Option(help="Dtype of the activations that cross to the worker. Default: --dtype's.")
]
WorkerOption = Annotated[
    str | None,
    typer.Option(help="Address of a running worker. Default: $LLAMA_IPC_PATH; without either, one is started."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where the worker computes: cpu, cuda:0. Default: $LLAMA_GPU_DEVICE, then cpu.")
]
ChannelOption = Annotated[str, typer.Option(help="zmq, or doorbell: shared memory and a semaphore, which is faster.")]
ArenaOption = Annotated[int | None, typer.Option(min=1, help="Size of each arena. Default: by the model.")]
ConnectOption = Annotated[
    float,
    typer.Option(min=0.0, help="Seconds to wait for the worker at --worker, which may still be loading its weights."),
]
ReconnectOption = Annotated[
    bool,
    typer.Option(
        "--reconnect/--no-reconnect",
        help="Connect again to a worker that was lost, and start our own again; the tokens stay the same.",
    ),
]
PipelineOption = Annotated[
    int,
    typer.Option(
        help="In fused and op: up to so many parts of a prompt under way together, so that both sides compute at the "
        "same time; as many times the calls. For a worker that computes elsewhere than on this side's cores.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_THREADS,
        help="Threads that torch computes with in this process, and in a worker of its own. The two compute in turn, "
        "so each may use all cores; idle threads sleep instead of spinning (OMP_WAIT_POLICY=PASSIVE, unless it is "
        "set). Default: torch's, one a core.",
    ),
]
NewTokensOption = Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")]
TemperatureOption = Annotated[
    float | None, typer.Option(min=0.0, help="Above 0: sample, the more freely the higher. Default: greedy.")
]
TopPOption = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this total probability.")
]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Sample from this many of the likeliest tokens.")]
SamplingSeedOption = Annotated[int | None, typer.Option(help="Sample the same tokens each time. Default: other ones.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Log what both processes do.")]


Group = TypeVar("Group")


def group(kind: type[Group], context: typer.Context) -> Group:
    """Those of a command's options that a dataclass has fields for, as one of these."""
    return kind(**{field.name: context.params[field.name] for field in fields(kind)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class SplitOptions:
    """What decides how a model is split, and with whom; as given, before the environment and defaults."""

    model: str | None
    random_weights: bool
    seed: int
    mode: str
    dtype: str | None
    wire_dtype: str | None
    worker: str | None
    device: str | None
    channel: str
    pipeline: int
    arena_bytes: int | None
    connect_timeout_s: float
    reconnect: bool
    threads: int | None
    verbose: bool


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest, or with a temperature above 0 at random.

    Raises:
        LlamaSplitError: a temperature that is no number, or options of sampling without one, which have no effect.
    """

    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed_sampling: int | None

    def __post_init__(self) -> None:
        if self.temperature is not None and not math.isfinite(self.temperature):
            raise LlamaSplitError(f"--temperature {self.temperature} is no number to divide by")
        given = {"--top-p": self.top_p, "--top-k": self.top_k, "--seed-sampling": self.seed_sampling}
        useless = [name for name, value in given.items() if value is not None]
        if useless and not self.temperature:
            raise LlamaSplitError(
                f"{' and '.join(useless)} would have no effect: tokens are sampled only with --temperature above 0"
            )

    def seed_generator(self) -> None:
        """Make what is sampled follow from the seed; without one it differs from run to run."""
        import torch

        if self.seed_sampling is None:
            torch.seed()  # a new process always starts from the same state
        else:
            torch.manual_seed(self.seed_sampling)

    def arguments(self) -> dict[str, Any]:
        """The same as settings of transformers' generation."""
        if not self.temperature:
            return {"do_sample": False}
        limits = {"top_p": self.top_p, "top_k": self.top_k}
        chosen = {name: value for name, value in limits.items() if value is not None}
        return {"do_sample": True, "temperature": self.temperature, **chosen}


def model_name(settings: Settings, model: str | None) -> str:
    """The model that was asked for; the demo's if none was.

    Raises:
        CheckpointError: none was, and the demo's is not installed.
    """
    chosen = settings.pick(model, MODEL_VARIABLE, None)
    return str(demo_model()) if chosen is None else chosen


def open_model(name: str, seed: int | None) -> Checkpoint:
    """The model of this name; with a seed, one of this shape with random weights.

    Raises:
        CheckpointError: there is none, or none that can be split.
    """
    if seed is not None:
        from ..synthetic import RandomCheckpoint

        return RandomCheckpoint(name, seed)
    from ..checkpoint import open_checkpoint

    return open_checkpoint(name)


def limit_threads(threads: int | None) -> None:
    """Let torch compute with so many threads, in whichever thread of this process it is called."""
    if threads is None:
        return
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is imported: for threads that start later
    import torch

    torch.set_num_threads(threads)
