"""``llama-split worker``: the untrusted side, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import LlamaSplitError
from ..launcher import READY, end_with_parent, remove_directory_of
from ..settings import ADDRESS_VARIABLE, DEVICE_VARIABLE, DTYPE_VARIABLE, Settings, parse_address
from .console import log, notice, notices, one_line_errors, print_json, progress_bar, statistics_table
from .options import (
    MOST_THREADS,
    DeviceOption,
    DtypeOption,
    ModelOption,
    RandomOption,
    SeedOption,
    VerboseOption,
    group,
    limit_threads,
    model_name,
    open_model,
)

if TYPE_CHECKING:
    from ..worker.sessions import SessionLimits

BindOption = Annotated[
    str | None, typer.Option(help="Address to serve, as ipc:///tmp/worker.ipc. Default: $LLAMA_IPC_PATH.")
]
EmbeddingOption = Annotated[
    bool, typer.Option("--embedding", help="Hold the embedding as well, for trusted sides in mode op.")
]
SessionsOption = Annotated[
    int | None, typer.Option(min=1, help="The most KV caches that are kept, of all clients. Default: 256.")
]
KvBytesOption = Annotated[
    int | None, typer.Option(min=1, help="The most bytes of KV, of all clients. Default: half of the memory.")
]
IdleOption = Annotated[
    float | None,
    typer.Option(
        min=0.0, help="A KV cache unused for so long may be dropped for another; its client rebuilds it. Default: 600."
    ),
]
WorkerThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_THREADS,
        help="Threads that torch computes with here. The trusted side waits meanwhile, so all cores may be used; "
        "idle threads sleep after some 0.1 ms (OMP_WAIT_POLICY=PASSIVE and GOMP_SPINCOUNT, unless they are set). "
        "Default: torch's, one a core.",
    ),
]
ChannelsOption = Annotated[
    str,
    typer.Option(
        help="Channels that trusted sides may use, separated by commas. With zmq alone, clients that don't trust each "
        "other can't end or delay this worker for the others."
    ),
]
SpinOption = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="Microseconds to look for a doorbell client's next call before waiting for it: saves a wake-up where "
        "there is a core to spare, and takes time where there is none.",
    ),
]


@dataclass(frozen=True)
class WorkerOptions:
    """What decides what is served, where and within which limits; as given, before the environment and defaults."""

    bind: str | None
    model: str | None
    dtype: str | None
    device: str | None
    embedding: bool
    max_sessions: int | None
    max_kv_bytes: int | None
    idle_s: float | None
    channels: str
    spin_us: float
    threads: int | None
    random_weights: bool
    seed: int
    as_json: bool
    verbose: bool

    def limits(self) -> SessionLimits:
        """Those that were given, and the defaults of the others."""
        from ..worker.sessions import SessionLimits

        given: dict[str, Any] = {
            "max_sessions": self.max_sessions,
            "max_kv_bytes": self.max_kv_bytes,
            "idle_s": self.idle_s,
        }
        return SessionLimits(**{name: value for name, value in given.items() if value is not None})


def worker(
    context: typer.Context,
    bind: BindOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    embedding: EmbeddingOption = False,
    max_sessions: SessionsOption = None,
    max_kv_bytes: KvBytesOption = None,
    idle_s: IdleOption = None,
    channels: ChannelsOption = "zmq,doorbell",
    spin_us: SpinOption = 0.0,
    threads: WorkerThreadsOption = None,
    random_weights: RandomOption = False,
    seed: SeedOption = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: an object when ready, one with statistics at the end.")
    ] = False,
    verbose: VerboseOption = False,
    parent: Annotated[int | None, typer.Option(hidden=True, help="End with this process.")] = None,
) -> None:
    """Hold the weight matrices and answer trusted sides until SIGINT or SIGTERM."""
    with one_line_errors(), contextlib.ExitStack() as stack:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        log(verbose)
        if parent is not None:
            stack.callback(remove_directory_of, bind or "")
            end_with_parent(parent)
        _serve(group(WorkerOptions, context), stack)


def _serve(options: WorkerOptions, stack: contextlib.ExitStack) -> None:
    settings = Settings(report=notice)
    address = settings.pick(options.bind, ADDRESS_VARIABLE, None)
    if address is None:
        raise LlamaSplitError(f"no address to serve: pass --bind ipc:///… or set {ADDRESS_VARIABLE}")
    name = model_name(settings, options.model)
    dtype_name = settings.pick(options.dtype, DTYPE_VARIABLE, "float32")
    device_name = settings.pick(options.device, DEVICE_VARIABLE, "cpu")
    limit_threads(options.threads)
    import torch

    from shmtransport import Server
    from shmtransport.text import printable

    from ..config import parse_channel, parse_device, parse_dtype
    from ..worker.kernels import Weights
    from ..worker.service import Service

    dtype, device = parse_dtype(dtype_name), parse_device(device_name)
    channels = [parse_channel(one.strip()) for one in options.channels.split(",")]
    server = stack.enter_context(Server(parse_address(address), channels=channels, spin_us=options.spin_us))
    checkpoint = open_model(name, options.seed if options.random_weights else None)
    with progress_bar("loading weights") as progress:
        weights = Weights(checkpoint, dtype, device, progress, embedding=options.embedding)
    Service(server, weights, checkpoint, options.limits())
    if options.as_json:
        facts = {"model": str(checkpoint.path), "dtype": dtype_name, "device": str(device), "address": server.address}
        print_json({READY: True, **facts, "threads": torch.get_num_threads(), "process": os.getpid()})
    else:
        print(f"{READY}: {printable(str(checkpoint.path))} in {dtype_name} on {device} at {server.address}", flush=True)
    server.serve()
    if options.as_json:
        print_json({"statistics": asdict(server.statistics())})
    elif options.verbose:
        notices.print(statistics_table(server.statistics()))
