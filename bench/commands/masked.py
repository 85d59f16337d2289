"""``bench masked``: what ``otp`` costs beside ``fused`` and beside the whole model in the trusted process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ..engine.measure import MODELS
from ..harness.results import setting
from ..reports.grid import Grid, time_text
from .engine import ModelsOption, RepeatsOption, ThreadsOption
from .options import command_of, names_of
from .output import show


@dataclass(frozen=True)
class MaskedOptions:
    """The options of ``bench masked``, as given."""

    models: ModelsOption = "smollm2"
    tokens: Annotated[int, typer.Option(min=32, help="Length of the prompt.")] = 1024
    repeats: RepeatsOption = 5
    threads: ThreadsOption = 2


@command_of(MaskedOptions)
def masked(options: MaskedOptions) -> None:
    """Time prompts and tokens with masks and without, in float32, and the dealing of masks; measure perplexity."""
    from ..engine.masked import MaskedJob, measure_masked  # it imports torch

    runs = [
        measure_masked(MaskedJob(model, options.tokens, options.repeats, options.threads))
        for model in names_of(options.models, MODELS)
    ]
    about = setting([], tokens=options.tokens, repeats=options.repeats, threads=options.threads)
    rows = []
    for run in runs:
        for name, times, prompt_s, token_s in (
            ("all in the trusted process", run.alone, 0.0, 0.0),
            ("fused", run.fused, 0.0, 0.0),
            ("otp, masks dealt before", run.masked, 0.0, 0.0),
            ("otp, with the dealer's time", run.masked, run.dealt_prompt_s, run.dealt_token_s),
        ):
            found = (times.prompt_s + prompt_s, times.token_s + token_s)
            of_fused = (found[0] / run.fused.prompt_s, found[1] / run.fused.token_s)
            of_alone = (found[0] / run.alone.prompt_s, found[1] / run.alone.token_s)
            cells = [
                (time_text(seconds * 1e6), f"{fused:.2f}", f"{alone:.2f}")
                for seconds, fused, alone in zip(found, of_fused, of_alone, strict=True)
            ]
            rows.append((f"{run.model}, {name}", *cells[0], *cells[1]))
    titles = ("", "prompt", "/ fused", "/ alone", "token", "/ fused", "/ alone")
    facts = [
        (
            run.model,
            f"{run.load_s:.1f} s",
            f"{run.bytes_a_token / 1e6:.2f} MB",
            *(("–", "–") if run.perplexity is None else (f"{one:.3f}" for one in run.perplexity)),
        )
        for run in runs
    ]
    show(
        about,
        [
            Grid("Forwards in float32", titles, rows),
            Grid("Masks", ("", "load, 128 masks dealt", "terms a token", "perplexity, float32", "quantised"), facts),
        ],
    )
