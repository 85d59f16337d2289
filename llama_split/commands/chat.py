"""``llama-split chat``: many turns, from a terminal or a pipe."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LlamaSplitError
from .console import notice, notices, one_line_errors, print_foreign_error, print_json
from .conversation import Conversation
from .opening import Opening
from .options import (
    ArenaOption,
    ChannelOption,
    ConnectOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    ModeOption,
    NewTokensOption,
    PipelineOption,
    RandomOption,
    ReconnectOption,
    Sampling,
    SamplingSeedOption,
    SeedOption,
    SplitOptions,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    VerboseOption,
    WireDtypeOption,
    WorkerOption,
    group,
)
from .prompts import about, printer

if TYPE_CHECKING:
    from ..trusted.model import SplitLlamaForCausalLM

_EXIT, _RESET = "/exit", "/reset"


def chat(
    context: typer.Context,
    model: ModelOption = None,
    mode: ModeOption = "fused",
    system: Annotated[str | None, typer.Option(help="What the model is told before all else.")] = None,
    dtype: DtypeOption = None,
    wire_dtype: WireDtypeOption = None,
    worker: WorkerOption = None,
    device: DeviceOption = None,
    max_new_tokens: NewTokensOption = 1024,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed_sampling: SamplingSeedOption = None,
    channel: ChannelOption = "zmq",
    pipeline: PipelineOption = 1,
    arena_bytes: ArenaOption = None,
    connect_timeout_s: ConnectOption = 30.0,
    reconnect: ReconnectOption = True,
    threads: ThreadsOption = None,
    random_weights: RandomOption = False,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a turn instead of a stream.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Chat: each line of standard input is a message; the KV cache is kept from turn to turn.

    /reset starts over, /exit or the end of the input ends it. Ctrl-C ends the answer that is being given.
    """
    with one_line_errors(), contextlib.ExitStack() as stack:
        sampling = group(Sampling, context)
        opening = Opening(group(SplitOptions, context), stack)
        if not opening.tokenizer.chat_template:
            raise LlamaSplitError("the model has no chat template; use `llama-split generate --no-chat`")
        conversation = Conversation(opening, max_new_tokens, sampling, system)
        llama = opening.connect()
        sampling.seed_generator()
        if sys.stdin.isatty():
            notice(f"{_RESET} starts over, {_EXIT} or Ctrl-D ends the chat, Ctrl-C ends an answer")
        _talk(conversation, llama, as_json=as_json)


def _talk(conversation: Conversation, llama: SplitLlamaForCausalLM, *, as_json: bool) -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are one message's error, not the end
    streamer = None if as_json else printer(conversation.tokenizer)
    facts = about(llama)
    number = 0
    while (line := _read_line()) is not None and line != _EXIT:
        if line == _RESET:
            conversation.reset()
            continue
        if not line:
            continue
        number += 1
        try:
            prompt = conversation.prompt(line)
        except LlamaSplitError as error:  # another message, or /reset, may do
            print_foreign_error(error)
            if as_json:
                print_json({"turn": number, "error": str(error)})
            continue
        before = llama.statistics()
        turn = conversation.ask(llama, prompt, streamer)
        if as_json:
            after = llama.statistics()
            moved = {
                name: getattr(after, name) - getattr(before, name)
                for name in ("calls", "tensor_bytes_sent", "tensor_bytes_received")
            }
            print_json({"turn": number, **turn.facts(), **facts, **moved})


def _read_line() -> str | None:
    """What the user says next, without white space around it; None at the end."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() editing and a history
        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
    if sys.stdin.isatty():
        notices.print("> ", end="")
    line = sys.stdin.readline()
    return line.strip() if line else None
