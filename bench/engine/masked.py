"""What the shield ``otp`` costs, beside ``fused`` without it and beside running everything in the trusted process."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from transformers import LlamaForCausalLM

from llama_split import SplitLlamaForCausalLM
from llama_split.checkpoint import Checkpoint, QuantisedCheckpoint
from llama_split.placement.local import WorkerProcess
from llama_split.shields.otp import OtpShield
from llama_split.shields.unsplit import quantise

from .fresh import DECODE_PROMPT, NEW_TOKENS, run_fresh, token_s
from .job import DEMO, checkpoint_of, model_options, prompt_for, unsplit

_DEALT_AT_ONCE = 128
_TEXT = Path(__file__).parents[2] / "LICENSE"  # a fixed text that comes with the project


@dataclass(frozen=True)
class Times:
    """Medians in seconds: of a prompt's forward, and of a token's in decoding."""

    prompt_s: float
    token_s: float


@dataclass(frozen=True)
class MaskedRun:
    """One model.

    Attributes:
        alone: transformers' model in the trusted process.
        fused: split, without a shield.
        masked: split, with masks that were dealt before.
        dealt_prompt_s: dealing the masks of the prompt.
        dealt_token_s: dealing those of a token in decoding, in batches of 128.
        bytes_a_token: of a file of masks, without those for logits.
        perplexity: of a fixed text: of the model in float32, and of the quantised one. None for random weights.
    """

    model: str
    load_s: float
    alone: Times
    fused: Times
    masked: Times
    dealt_prompt_s: float
    dealt_token_s: float
    bytes_a_token: int
    perplexity: tuple[float, float] | None


@dataclass(frozen=True)
class MaskedJob:
    """What one process measures.

    Attributes:
        model: "smollm2", or a shape, which gets random weights.
        tokens: the length of the prompt.
        repeats: forwards of each.
        threads: that each side computes with.
    """

    model: str
    tokens: int
    repeats: int
    threads: int


def measure_masked(job: MaskedJob) -> MaskedRun:
    """Measure one model in a process of its own; see ``run_fresh``."""
    return run_fresh("bench.engine.masked", job, job.model, MaskedRun)


def _measure(job: MaskedJob) -> MaskedRun:
    """Measure one model; the three forms of it take turns."""
    torch.set_num_threads(job.threads)
    checkpoint = checkpoint_of(job.model)
    shield = OtpShield(ahead=_DEALT_AT_ONCE)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        alone = unsplit(checkpoint, "float32")
        fused = stack.enter_context(_split(job, checkpoint, "float32", None))
        started = time.perf_counter()
        masked = stack.enter_context(_split(job, checkpoint, "int8", shield))
        load_s = time.perf_counter() - started
        times = _times({"alone": alone, "fused": fused, "masked": masked}, job, shield)
        dealt_prompt_s, dealt_token_s = (
            _dealing(shield, tokens) / each for tokens, each in ((job.tokens, 1), (_DEALT_AT_ONCE, _DEALT_AT_ONCE))
        )
        widths = QuantisedCheckpoint(checkpoint).widths
        bytes_a_token = 4 * sum(width.output for (operation, _), width in widths.items() if operation.per_layer)
        perplexity = _perplexities(alone, checkpoint) if job.model == DEMO else None
    return MaskedRun(
        job.model, load_s, **times, dealt_prompt_s=dealt_prompt_s, dealt_token_s=dealt_token_s,
        bytes_a_token=bytes_a_token, perplexity=perplexity,
    )  # fmt: skip


@contextmanager
def _split(
    job: MaskedJob, checkpoint: Checkpoint, worker_dtype: str, shield: OtpShield | None
) -> Iterator[SplitLlamaForCausalLM]:
    options = ["--dtype", worker_dtype, "--threads", str(job.threads), *model_options(job.model)]
    with WorkerProcess(options) as worker:
        worker.wait_until_ready()
        with SplitLlamaForCausalLM.from_pretrained(
            checkpoint, worker=worker.address, dtype="float32", channel="doorbell", shield=shield
        ) as split:
            yield split


def _times(models: dict[str, LlamaForCausalLM], job: MaskedJob, shield: OtpShield) -> dict[str, Times]:
    """Forwards and generations of all models in turn, so that a busy machine slows all of them."""
    prompts: dict[str, list[float]] = {name: [] for name in models}
    tokens: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(job.repeats + 1):
        shield.deal_ahead(job.tokens + DECODE_PROMPT + NEW_TOKENS, NEW_TOKENS + 2)
        for name, model in models.items():
            ids = prompt_for(model, job.tokens)
            started = time.perf_counter()
            model(ids, logits_to_keep=1)
            prompts[name].append(time.perf_counter() - started)
            tokens[name].append(token_s(model))
    return {name: Times(*(statistics.median(found[name][1:]) for found in (prompts, tokens))) for name in models}


def _dealing(shield: OtpShield, tokens: int) -> float:
    """Seconds to deal masks for this many more tokens than there are."""
    started = time.perf_counter()
    shield.deal_ahead(shield.tokens_left + tokens, 1)
    return time.perf_counter() - started


def _perplexities(alone: LlamaForCausalLM, checkpoint: Checkpoint) -> tuple[float, float]:
    """Of the fixed text: the model's, and the quantised model's, which it is made into."""
    ids = torch.tensor([checkpoint.tokenizer().encode(_TEXT.read_text(encoding="utf-8"))])
    before = _perplexity(alone, ids)
    return before, _perplexity(quantise(alone, checkpoint), ids)


def _perplexity(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    logits = model(ids).logits[0, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(_measure(msgspec.json.decode(sys.argv[1], type=MaskedJob))))
