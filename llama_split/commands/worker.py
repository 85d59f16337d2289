"""``llama-split worker``: the untrusted side, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from shmtransport.text import printable

from ..boundary.choices import DTYPES, INTEGERS, parse_channel
from ..boundary.division import layers_text, parse_layers
from ..errors import LlamaSplitError
from ..placement.local import READY, end_with_parent, remove_directory_of
from .console import log, notice, notices, print_json, progress_bar, statistics_table
from .options import (
    MOST_THREADS,
    DeviceOption,
    ModelOption,
    RandomOption,
    SeedOption,
    VerboseOption,
    limit_threads,
    model_name,
    open_model,
)
from .settings import ADDRESS_VARIABLE, DEVICE_VARIABLE, DTYPE_VARIABLE, Settings, parse_address
from .signature import takes

if TYPE_CHECKING:
    import torch

    from shmtransport import Server

    from ..checkpoint import Checkpoint
    from ..worker.sessions import SessionLimits


@dataclass(frozen=True)
class WorkerOptions:
    """What is served, where, and within which limits; as given, before the environment and defaults."""

    bind: Annotated[
        str | None, typer.Option(help="Address to serve, for example ipc:///tmp/worker.ipc. Default: $LLAMA_IPC_PATH.")
    ] = None
    model: ModelOption = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16: weights and arithmetic; int8 for trusted sides with --shield otp. "
            "Default: $LLAMA_DTYPE, then float32."
        ),
    ] = None
    device: DeviceOption = None
    embedding: Annotated[
        bool, typer.Option("--embedding", help="Hold the embedding as well, for trusted sides in mode op.")
    ] = False
    layers: Annotated[
        str | None,
        typer.Option(
            help="Hold these layers only, for example 0-15, where several workers share them; `llama-split info "
            "--workers` divides them. Default: all."
        ),
    ] = None
    max_sessions: Annotated[
        int | None, typer.Option(min=1, help="The most KV caches that are kept, over all clients. Default: 256.")
    ] = None
    max_kv_bytes: Annotated[
        int | None, typer.Option(min=1, help="The most bytes of KV, over all clients. Default: half of the memory.")
    ] = None
    idle_s: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Seconds after which an unused KV cache may be dropped for another; its client rebuilds it. "
            "Default: 600.",
        ),
    ] = None
    channels: Annotated[
        str,
        typer.Option(help="Channels that trusted sides may use, separated by commas."),
    ] = "zmq,doorbell"
    spin_us: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Microseconds to look for a doorbell client's next call before blocking: saves a wake-up where a core "
            "is free, and costs time where none is. Default: up to 50, while that pays.",
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_THREADS,
            help="Threads that torch computes with here. The trusted side waits during that time, so all cores may be "
            "used; idle threads sleep after about 0.1 ms (OMP_WAIT_POLICY=PASSIVE and GOMP_SPINCOUNT, unless they are "
            "set). Default: torch's, one per core.",
        ),
    ] = None
    random_weights: RandomOption = False
    seed: SeedOption = 0
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: an object when ready, one with statistics at the end.")
    ] = False
    verbose: VerboseOption = False
    parent: Annotated[int | None, typer.Option(hidden=True, help="End with this process.")] = None

    def for_attention(self) -> list[str]:
        """The options that were given and are of no use to a worker that only multiplies."""
        given = {
            "--embedding": self.embedding or None,
            "--max-sessions": self.max_sessions,
            "--max-kv-bytes": self.max_kv_bytes,
            "--idle-s": self.idle_s,
        }
        return [name for name, value in given.items() if value is not None]

    def limits(self) -> SessionLimits:
        """The limits that were given, with the defaults of the others."""
        from ..worker.sessions import SessionLimits

        given: dict[str, Any] = {
            "max_sessions": self.max_sessions,
            "max_kv_bytes": self.max_kv_bytes,
            "idle_s": self.idle_s,
        }
        return SessionLimits(**{name: value for name, value in given.items() if value is not None})


@takes(WorkerOptions)
def worker(options: WorkerOptions) -> None:
    """Hold the weights and answer trusted sides. SIGINT or SIGTERM ends it."""
    with contextlib.ExitStack() as stack:
        signal.signal(signal.SIGTERM, _end_once)
        log(options.verbose)
        if options.parent is not None:
            stack.callback(remove_directory_of, options.bind or "")
            end_with_parent(options.parent)
        _serve(options, stack)


def _end_once(*_signal: object) -> NoReturn:
    """End the process in order. The kernel may send one signal for each thread of a parent that was killed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def _serve(options: WorkerOptions, stack: contextlib.ExitStack) -> None:
    settings = Settings(report=notice)
    address = settings.pick(options.bind, ADDRESS_VARIABLE, None)
    if address is None:
        raise LlamaSplitError(f"no address to serve: pass --bind ipc:///… or set {ADDRESS_VARIABLE}")
    name = model_name(settings, options.model)
    dtype_name = settings.pick(options.dtype, DTYPE_VARIABLE, "float32")
    if dtype_name not in (INTEGERS, *DTYPES):
        raise LlamaSplitError(f"dtype {dtype_name} is not supported; choose one of {', '.join((*DTYPES, INTEGERS))}")
    if dtype_name == INTEGERS and (useless := options.for_attention()):
        raise LlamaSplitError(
            f"{' and '.join(useless)} would have no effect: with --dtype int8 a worker only multiplies"
        )
    channels = [parse_channel(one.strip()) for one in options.channels.split(",")]
    device_name = settings.pick(options.device, DEVICE_VARIABLE, "cpu")
    limit_threads(options.threads)
    import torch

    from ..boundary.compute import parse_device
    from ..worker.listening import server_for

    device = parse_device(device_name)
    server = stack.enter_context(server_for(parse_address(address), device, channels=channels, spin_us=options.spin_us))
    stack.callback(signal.signal, signal.SIGTERM, signal.SIG_IGN)  # first of all that ends: nothing interrupts the rest
    checkpoint = open_model(name, options.seed if options.random_weights else None)
    layers = None if options.layers is None else parse_layers(options.layers, checkpoint.geometry.layers)
    held = _register(server, checkpoint, device, layers, dtype_name, options)
    if options.as_json:
        facts = {"model": str(checkpoint.path), "dtype": dtype_name, "device": str(device), "address": server.address}
        state = {"layers": layers_text(held), "threads": torch.get_num_threads(), "process": os.getpid()}
        print_json({READY: True, **facts, **state})
    else:
        held_text = "" if layers is None else f", layers {layers_text(layers)},"
        model = printable(str(checkpoint.path))
        print(f"{READY}: {model}{held_text} in {dtype_name} on {device} at {server.address}", flush=True)
    server.serve()
    if options.as_json:
        print_json({"statistics": asdict(server.statistics())})
    elif options.verbose:
        notices.print(statistics_table(server.statistics()))


def _register(
    server: Server,
    checkpoint: Checkpoint,
    device: torch.device,
    layers: range | None,
    dtype: str,
    options: WorkerOptions,
) -> range:
    """Load the weights and register their handlers; returns which layers are held."""
    from ..boundary.compute import parse_dtype
    from ..worker.integer_weights import IntegerWeights
    from ..worker.linear_service import IntegerService
    from ..worker.service import Service
    from ..worker.weights import Weights

    with progress_bar("loading weights") as progress:
        if dtype == INTEGERS:
            integers = IntegerWeights(checkpoint, device, progress, layers=layers)
            IntegerService(server, integers, checkpoint)
            return integers.held
        weights = Weights(checkpoint, parse_dtype(dtype), device, progress, embedding=options.embedding, layers=layers)
    Service(server, weights, checkpoint, options.limits())
    return weights.held
