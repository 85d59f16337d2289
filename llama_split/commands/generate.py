"""``llama-split generate``: one prompt, one answer."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Annotated

import typer

from .console import notice, one_line_errors, print_json, results, statistics_table
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
from .prompts import about, answer, decode, encode_chat, encode_text, printer


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Option(help="What to answer or, with --no-chat, to continue.")],
    model: ModelOption = None,
    mode: ModeOption = "fused",
    dtype: DtypeOption = None,
    wire_dtype: WireDtypeOption = None,
    worker: WorkerOption = None,
    device: DeviceOption = None,
    max_new_tokens: NewTokensOption = 256,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed_sampling: SamplingSeedOption = None,
    chat: Annotated[bool, typer.Option(" /--no-chat", help="Take the prompt as plain text to continue.")] = True,
    channel: ChannelOption = "zmq",
    pipeline: PipelineOption = 1,
    arena_bytes: ArenaOption = None,
    connect_timeout_s: ConnectOption = 30.0,
    reconnect: ReconnectOption = True,
    threads: ThreadsOption = None,
    random_weights: RandomOption = False,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a stream.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer one prompt; streams text as it comes, then prints what the transport did."""
    with one_line_errors(), contextlib.ExitStack() as stack:
        sampling = group(Sampling, context)
        opening = Opening(group(SplitOptions, context), stack)
        tokenizer = opening.tokenizer
        if chat and not tokenizer.chat_template:
            notice("the model has no chat template; the prompt is continued as plain text")
            chat = False
        messages = [{"role": "user", "content": prompt}]
        ids = encode_chat(tokenizer, messages) if chat else encode_text(tokenizer, prompt)
        opening.check_prompt(ids)
        llama = opening.connect()
        sampling.seed_generator()
        limit = min(max_new_tokens, opening.positions - ids.shape[1])
        tokens = answer(llama, tokenizer, ids, limit, sampling, streamer=None if as_json else printer(tokenizer))
        if as_json:
            text = decode(tokenizer, tokens)
            statistics = {"statistics": asdict(llama.statistics())}
            print_json({"text": text, "token_ids": tokens, "prompt_tokens": ids.shape[1], **about(llama), **statistics})
        else:
            results.print(statistics_table(llama.statistics()))
