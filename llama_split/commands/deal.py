"""``llama-split deal``: computes masks for the shield ``otp`` beforehand, on a machine that is trusted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shmtransport.text import printable
from shmtransport.units import size_text

from .console import log, notice, print_json, progress_bar, results
from .options import ModelOption, RandomOption, SeedOption, VerboseOption, limit_threads, model_name, open_model
from .settings import Settings
from .signature import takes


@dataclass(frozen=True, kw_only=True)
class DealOptions:
    """The options of ``llama-split deal``, in the order of its help."""

    masks: Annotated[str, typer.Option(help="The file to make. Keep it as secret as the prompts.")]
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens, of prompts and answers, it is for.")] = 4096
    logits: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many tokens' logits it is for: about one for each token of an answer. Default: a quarter."
        ),
    ] = None
    model: ModelOption = None
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to compute with. Default: torch's.")] = None
    random_weights: RandomOption = False
    seed: SeedOption = 0
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
    verbose: VerboseOption = False


@takes(DealOptions)
def deal(options: DealOptions) -> None:
    """Make a file of masks for --shield otp. Each mask is used once; run this where the model may see the prompts."""
    log(options.verbose)
    name = model_name(Settings(report=notice), options.model)
    limit_threads(options.threads)
    from ..shields.dealer import deal_file

    checkpoint = open_model(name, options.seed if options.random_weights else None)
    logits = -(-options.tokens // 4) if options.logits is None else options.logits
    with progress_bar("dealing") as progress:
        nbytes = deal_file(checkpoint, Path(options.masks), options.tokens, logits, progress)
    if options.as_json:
        print_json({"masks": options.masks, "tokens": options.tokens, "logits": logits, "nbytes": nbytes})
    else:
        results.print(
            f"{printable(options.masks)}: masks for {options.tokens} tokens and the logits of {logits}, "
            f"{size_text(nbytes)}",
            markup=False,
            soft_wrap=True,
        )
