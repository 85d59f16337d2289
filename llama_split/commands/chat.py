"""``llama-split chat``: many turns, from a terminal or a pipe."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LlamaSplitError
from .console import notice, notices, print_foreign_error, print_json
from .conversation import Conversation
from .opening import Opening
from .options import AdvancedOptions, NewTokensOption, Sampling, SplitOptions, VerboseOption
from .prompts import about, printer
from .signature import takes

if TYPE_CHECKING:
    from ..trusted.model import SplitLlamaForCausalLM

_EXIT, _RESET, _HELP = "/exit", "/reset", "/help"
_COMMAND = re.compile(r"/[A-Za-z]+(?!\S)")
_EXPLAINED = (
    f"{_RESET} starts over, {_EXIT} or Ctrl-D ends the chat, {_HELP} shows this; Ctrl-C stops an answer, and twice at "
    "the prompt it ends the chat; a message that looks like a command needs a space before it"
)


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The options of ``llama-split chat``, in the order of its help."""

    split: SplitOptions
    system: Annotated[str | None, typer.Option(help="What the model is told before anything else.")] = None
    max_new_tokens: NewTokensOption = 1024
    sampling: Sampling
    advanced: AdvancedOptions
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per turn instead of a stream.")] = False
    verbose: VerboseOption = False


@takes(ChatOptions)
def chat(options: ChatOptions) -> None:
    """Chat with the model. Each line of standard input is a message; the KV cache is kept from turn to turn.

    /reset starts over; /exit or the end of the input ends the chat; /help lists what else there is. Ctrl-C stops the
    current answer.
    """
    with contextlib.ExitStack() as stack:
        opening = Opening(options.split, options.advanced, stack, verbose=options.verbose)
        if not opening.tokenizer.chat_template:
            raise LlamaSplitError("the model has no chat template; use `llama-split generate --no-chat`")
        conversation = Conversation(opening, options.max_new_tokens, options.sampling, options.system)
        llama = opening.connect()
        options.sampling.seed_generator()
        if sys.stdin.isatty():
            notice(_EXPLAINED)
        _talk(conversation, llama, as_json=options.as_json)


def _talk(conversation: Conversation, llama: SplitLlamaForCausalLM, *, as_json: bool) -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text fail one message, not the chat
    streamer = None if as_json else printer(conversation.tokenizer)
    facts = about(llama)
    number = 0
    while (line := _read_line()) is not None and line != _EXIT:
        if line == _RESET:
            conversation.reset()
        if line == _HELP:
            notice(_EXPLAINED)
        if line in (_RESET, _HELP) or not line.strip():
            continue
        number += 1
        try:
            if _COMMAND.match(line):
                raise LlamaSplitError(f"there is no such command: {line}; {_HELP} lists the commands")
            prompt = conversation.prompt(line.strip())
        except LlamaSplitError as error:  # another message, or a command, may work
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
    """The user's next line, without white space at its end; None at the end of the input.

    On a terminal Ctrl-C gives up the line, and only a second one in a row is raised.
    """
    try:
        line = _ask_for_line()
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        notice("\nCtrl-C once more, or Ctrl-D, ends the chat")
        line = _ask_for_line()
    return None if line is None else line.rstrip()


def _ask_for_line() -> str | None:
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - adds editing and a history to input()
        try:
            return input("> ")
        except EOFError:
            print()
            return None
    if sys.stdin.isatty():
        notices.print("> ", end="")
    return sys.stdin.readline() or None
