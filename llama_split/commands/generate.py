"""``llama-split generate``: one prompt, one answer."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from .console import notice, print_json, results, statistics_table
from .opening import Opening
from .options import AdvancedOptions, NewTokensOption, Sampling, SplitOptions, VerboseOption
from .prompts import about, answer, decode, encode_chat, encode_text, printer
from .signature import takes


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options of ``llama-split generate``, in the order of its help."""

    prompt: Annotated[str, typer.Option(help="What to answer or, with --no-chat, to continue.")]
    split: SplitOptions
    max_new_tokens: NewTokensOption = 256
    sampling: Sampling
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--no-chat", help="Put the prompt into the model's chat template, or continue it as plain text."
        ),
    ] = True
    advanced: AdvancedOptions
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a stream.")] = False
    verbose: VerboseOption = False


@takes(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Answer one prompt. Its text is streamed, and then what the transport did is printed."""
    with contextlib.ExitStack() as stack:
        opening = Opening(options.split, options.advanced, stack, verbose=options.verbose)
        tokenizer = opening.tokenizer
        chat = options.chat
        if chat and not tokenizer.chat_template:
            notice("the model has no chat template; the prompt is continued as plain text")
            chat = False
        messages = [{"role": "user", "content": options.prompt}]
        ids = encode_chat(tokenizer, messages) if chat else encode_text(tokenizer, options.prompt)
        opening.check_prompt(ids)
        llama = opening.connect()
        options.sampling.seed_generator()
        limit = min(options.max_new_tokens, opening.positions - ids.shape[1])
        streamer = None if options.as_json else printer(tokenizer)
        tokens = answer(llama, tokenizer, ids, limit, options.sampling, streamer=streamer)
        if options.as_json:
            text = decode(tokenizer, tokens)
            statistics = {"statistics": asdict(llama.statistics())}
            print_json({"text": text, "token_ids": tokens, "prompt_tokens": ids.shape[1], **about(llama), **statistics})
        else:
            results.print(statistics_table(llama.statistics()))
