"""The command line: ``llama-split generate`` and ``llama-split worker``.

Heavy imports happen inside the commands, so that ``--help`` is quick and thread policies are set before torch starts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from .errors import LlamaSplitError
from .launcher import READY, WorkerProcess, end_with_parent, remove_directory_of
from .settings import (
    ADDRESS_VARIABLE,
    DEVICE_VARIABLE,
    DTYPE_VARIABLE,
    MODEL_VARIABLE,
    Settings,
    demo_model,
    parse_address,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from shmtransport import Statistics

    from .checkpoint import Checkpoint
    from .checkpoint import Progress as OnProgress
    from .trusted.model import SplitLlamaForCausalLM

# Two processes compute in turn: a thread that spins while it has nothing to do would take the other's core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    help="Split Llama inference: the prompt stays here, a worker multiplies.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
notices = Console(stderr=True, highlight=False, soft_wrap=True)

ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Directory, .gguf file, hub id or, with --random-weights, a shape. "
        "Default: $LLAMA_MODEL_PATH, then the demo's model."
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16: weights, arithmetic and wire. Default: $LLAMA_DTYPE, then float32."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where the worker computes: cpu, cuda:0. Default: $LLAMA_GPU_DEVICE, then cpu.")
]
RandomOption = Annotated[
    bool,
    typer.Option("--random-weights", help="--model names a shape: llama-3.2-1b, llama-3.1-8b, tinyllama-1.1b."),
]
SeedOption = Annotated[int, typer.Option(help="Of random weights; the same on both sides.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Log what both processes do.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to answer or, with --no-chat, to continue.")],
    model: ModelOption = None,
    mode: Annotated[
        str, typer.Option(help="fused (attention and KV stay here), layer or stack (they are the worker's).")
    ] = "fused",
    dtype: DtypeOption = None,
    worker: Annotated[
        str | None,
        typer.Option(help="Address of a running worker. Default: $LLAMA_IPC_PATH; without either, one is started."),
    ] = None,
    device: DeviceOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 256,
    channel: Annotated[
        str, typer.Option(help="zmq, or doorbell: shared memory and a semaphore, which is faster.")
    ] = "zmq",
    chat: Annotated[bool, typer.Option(" /--no-chat", help="Take the prompt as plain text to continue.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a stream.")] = False,
    arena_bytes: Annotated[int | None, typer.Option(min=1, help="Size of each arena. Default: by the model.")] = None,
    random_weights: RandomOption = False,
    seed: SeedOption = 0,
    verbose: VerboseOption = False,
) -> None:
    """Generate text greedily; streams it as it comes, then prints what the transport did."""
    with _one_line_errors(), contextlib.ExitStack() as stack:
        _log(verbose)
        settings = Settings(report=_notice)
        dtype_name = settings.pick(dtype, DTYPE_VARIABLE, "float32")
        model_name = _model_name(settings, model)
        address = settings.pick(worker, ADDRESS_VARIABLE, None)
        own: WorkerProcess | None = None
        if address is None:  # started first, so that both processes import and load at the same time
            device_name = settings.pick(device, DEVICE_VARIABLE, "cpu")
            options = ["--model", model_name, "--dtype", dtype_name, "--device", device_name]
            options += ["--random-weights", "--seed", str(seed)] if random_weights else []
            own = stack.enter_context(WorkerProcess(options, verbose=verbose))
            address = own.address
        elif device is not None:
            _notice(f"--device {device} has no effect: the worker at {address} runs where it was started")
        from .config import parse_channel, parse_dtype, parse_mode
        from .trusted.model import SplitLlamaForCausalLM

        chosen_mode, chosen_dtype, chosen_channel = parse_mode(mode), parse_dtype(dtype_name), parse_channel(channel)
        checkpoint = _open(model_name, seed if random_weights else None)
        tokenizer = checkpoint.tokenizer()
        ids = _encode(tokenizer, prompt, chat=chat)
        _check_length(ids.shape[1], checkpoint)
        if own is not None:
            with notices.status("the worker is loading its weights"):
                own.wait_until_ready()
        with _progress("loading the trusted part") as progress:
            llama = stack.enter_context(
                SplitLlamaForCausalLM.from_pretrained(
                    checkpoint,
                    worker=parse_address(address),
                    mode=chosen_mode,
                    dtype=chosen_dtype,
                    arena_bytes=arena_bytes,
                    channel=chosen_channel,
                    progress=progress,
                )
            )
        room = checkpoint.config.max_position_embeddings - ids.shape[1]
        tokens = _stream(llama, tokenizer, ids, min(max_new_tokens, room), quiet=as_json)
        if as_json:
            print(json.dumps(_result(llama, tokenizer, tokens)))
        else:
            Console(highlight=False).print(_table(llama.statistics()))


@app.command()
def worker(
    bind: Annotated[
        str | None, typer.Option(help="Address to serve, as ipc:///tmp/worker.ipc. Default: $LLAMA_IPC_PATH.")
    ] = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    random_weights: RandomOption = False,
    seed: SeedOption = 0,
    verbose: VerboseOption = False,
    parent: Annotated[int | None, typer.Option(hidden=True, help="End with this process.")] = None,
) -> None:
    """Hold the weight matrices and answer trusted sides until SIGINT or SIGTERM."""
    with _one_line_errors(), contextlib.ExitStack() as stack:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        _log(verbose)
        if parent is not None:
            stack.callback(remove_directory_of, bind or "")
            end_with_parent(parent)
        settings = Settings(report=_notice)
        address = settings.pick(bind, ADDRESS_VARIABLE, None)
        if address is None:
            raise LlamaSplitError(f"no address to serve: pass --bind ipc:///… or set {ADDRESS_VARIABLE}")
        model_name = _model_name(settings, model)
        dtype_name = settings.pick(dtype, DTYPE_VARIABLE, "float32")
        device_name = settings.pick(device, DEVICE_VARIABLE, "cpu")
        from shmtransport import Server

        from .config import parse_device, parse_dtype
        from .worker.kernels import Weights
        from .worker.service import Service

        chosen_dtype, chosen_device = parse_dtype(dtype_name), parse_device(device_name)
        server = stack.enter_context(Server(parse_address(address)))
        checkpoint = _open(model_name, seed if random_weights else None)
        with _progress("loading weights") as progress:
            weights = Weights(checkpoint, chosen_dtype, chosen_device, progress)
        Service(server, weights, checkpoint)
        print(f"{READY}: {checkpoint.path} in {dtype_name} on {chosen_device} at {server.address}", flush=True)
        server.serve()
        if verbose:
            notices.print(_table(server.statistics()))


def _open(model_name: str, seed: int | None) -> Checkpoint:
    """The model of this name; with a seed, one of this shape with random weights."""
    if seed is not None:
        from .synthetic import RandomCheckpoint

        return RandomCheckpoint(model_name, seed)
    from .checkpoint import open_checkpoint

    return open_checkpoint(model_name)


def _model_name(settings: Settings, model: str | None) -> str:
    chosen = settings.pick(model, MODEL_VARIABLE, None)
    return str(demo_model()) if chosen is None else chosen


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> torch.Tensor:
    if chat and not tokenizer.chat_template:
        _notice("the model has no chat template; the prompt is continued as plain text")
        chat = False
    if chat:
        messages = [{"role": "user", "content": prompt}]
        try:
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template is the model's own program and may raise anything
            raise LlamaSplitError(f"the model's chat template can't be used: {error}; try --no-chat") from error
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise LlamaSplitError("the prompt is empty: pass some text")
    return ids


def _check_length(tokens: int, checkpoint: Checkpoint) -> None:
    positions = checkpoint.config.max_position_embeddings
    if tokens >= positions:
        raise LlamaSplitError(
            f"the prompt has {tokens} tokens; the model has {positions} positions, one of them for an answer: "
            f"shorten the prompt by {tokens - positions + 1} tokens"
        )


def _stream(
    llama: SplitLlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, limit: int, *, quiet: bool
) -> list[int]:
    """Generate greedily, printing as tokens come unless ``quiet``; the new tokens' ids."""
    import torch
    from transformers import TextStreamer

    streamer = None if quiet else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = llama.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        streamer=streamer,
        pad_token_id=llama.config.pad_token_id if llama.config.pad_token_id is not None else 0,
    )
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


def _result(llama: SplitLlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> dict[str, object]:
    from .config import DTYPE_NAMES

    client = llama.link.client
    return {
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "token_ids": tokens,
        "mode": llama.mode.value,
        "dtype": DTYPE_NAMES[llama.dtype],
        "transport": {"address": client.address, "kind": client.transport, "channel": client.channel},
        "statistics": asdict(llama.statistics()),
    }


def _table(statistics: Statistics) -> Table:
    table = Table(title="transport", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in statistics.rows():
        table.add_row(*row)
    return table


def _notice(line: str) -> None:
    notices.print(line, style="yellow", markup=False)


def _log(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(process)d %(name)s: %(message)s"
    )


@contextlib.contextmanager
def _progress(what: str) -> Iterator[OnProgress]:
    """A progress bar on the terminal, as a function to call with how many are done, of how many."""
    with Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        console=notices,
        transient=True,
        disable=not notices.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        notices.print("interrupted", markup=False)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except Exception as error:
        from shmtransport import TransportError  # imports torch: not before there is an error

        if not isinstance(error, (LlamaSplitError, TransportError, OSError, MemoryError)):
            raise
        notices.print(f"error: {' '.join(str(error).split())}", style="red", markup=False)
        raise typer.Exit(EXIT_ERROR) from None


def main() -> None:
    """Entry point of the ``llama-split`` script."""
    app()


if __name__ == "__main__":
    main()
