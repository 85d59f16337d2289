"""What the shield ``verify`` costs, how often it suspects an honest worker, and which wrong results it finds."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from llama_split import SplitLlamaForCausalLM
from llama_split.boundary.operations import LINEARS
from llama_split.checkpoint import Checkpoint
from llama_split.model.program import WorkerOp
from llama_split.placement.local import WorkerProcess
from llama_split.shields.base import Covered
from llama_split.shields.verify import VerifyShield

from .fresh import run_fresh, token_s
from .job import checkpoint_of, model_options, prompt_for

SIZES = tuple(10.0**power for power in (-6, -5.5, -5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0))
"""Sizes of an error, as a part of the length of the row that it is in."""
_CURVE_ROWS = 400


@dataclass(frozen=True)
class Cost:
    """Medians in seconds without and with the shield, of forwards in turn."""

    plain_s: float
    verified_s: float

    @property
    def ratio(self) -> float:
        """How much longer it takes with the shield."""
        return self.verified_s / self.plain_s


@dataclass(frozen=True)
class ShieldRun:
    """One model in one dtype.

    Attributes:
        load_s: drawing and computing the secrets, in seconds.
        prefill: of a prompt.
        decode: of a token.
        checks: how many rows of an honest worker were checked.
        refused: how many of them were refused.
        largest: the largest difference of an honest row, as a part of its threshold.
        found: for each of ``SIZES``, the share of wrong rows that were found.
    """

    model: str
    dtype: str
    load_s: float
    prefill: Cost
    decode: Cost
    checks: int
    refused: int
    largest: float
    found: tuple[float, ...]


class _Counting(VerifyShield):
    """Refuses nothing, and counts what it would have refused."""

    checks = refused = 0
    largest = 0.0

    @staticmethod
    def _is_within(_difference: torch.Tensor, _threshold: torch.Tensor) -> bool:
        return False  # so that each is judged by itself

    def _judge(self, op: WorkerOp, difference: torch.Tensor, threshold: torch.Tensor) -> None:
        parts = difference.abs() / threshold[..., None]
        self.checks += parts.numel()
        self.refused += int((~(parts < 1)).sum())
        self.largest = max(self.largest, float(parts.max()))


@dataclass(frozen=True)
class ShieldJob:
    """What one process measures.

    Attributes:
        model: "smollm2", or a shape, which gets random weights.
        dtype: of weights, arithmetic and what crosses.
        tokens: the length of the prompt.
        repeats: forwards of each.
        checks: how many honest rows to check at least.
        threads: that each side computes with.
    """

    model: str
    dtype: str
    tokens: int
    repeats: int
    checks: int
    threads: int


def measure_shield(job: ShieldJob) -> ShieldRun:
    """Measure one model in a process of its own; see ``run_fresh``."""
    return run_fresh("bench.engine.shield", job, f"{job.model} in {job.dtype}", ShieldRun)


def _measure(job: ShieldJob) -> ShieldRun:
    """Measure one model; both splits use one worker, in turn."""
    model, dtype, tokens = job.model, job.dtype, job.tokens
    torch.set_num_threads(job.threads)
    checkpoint = checkpoint_of(model)
    options = ["--dtype", dtype, "--threads", str(job.threads), *model_options(model)]
    with ExitStack() as stack:
        worker = stack.enter_context(WorkerProcess(options))
        worker.wait_until_ready()
        stack.enter_context(torch.inference_mode())
        plain = stack.enter_context(_split(checkpoint, worker.address, dtype, None))
        started = time.perf_counter()
        verified = stack.enter_context(_split(checkpoint, worker.address, dtype, VerifyShield()))
        load_s = time.perf_counter() - started
        prefill, decode = _costs((plain, verified), tokens, job.repeats)
        counting = _Counting()
        with _split(checkpoint, worker.address, dtype, counting) as honest:
            for seed in range(10**6):
                honest(prompt_for(honest, tokens, seed), logits_to_keep=1)
                if counting.checks >= job.checks:
                    break
            found = tuple(_found(counting, honest, size) for size in SIZES)
    return ShieldRun(model, dtype, load_s, prefill, decode, counting.checks, counting.refused, counting.largest, found)


@contextmanager
def _split(
    checkpoint: Checkpoint, address: str, dtype: str, shield: VerifyShield | None
) -> Iterator[SplitLlamaForCausalLM]:
    options: dict[str, Any] = {"mode": "fused", "dtype": dtype, "channel": "doorbell", "shield": shield}
    with SplitLlamaForCausalLM.from_pretrained(checkpoint, worker=address, **options) as split:
        yield split


def _costs(models: Sequence[SplitLlamaForCausalLM], tokens: int, repeats: int) -> tuple[Cost, Cost]:
    """Forwards and generations of all models in turn, so that a busy machine slows all of them."""
    prefills: list[list[float]] = [[] for _ in models]
    decodes: list[list[float]] = [[] for _ in models]
    for _ in range(repeats + 1):
        for model, of_prefill, of_decode in zip(models, prefills, decodes, strict=True):
            ids = prompt_for(model, tokens)
            started = time.perf_counter()
            model(ids, logits_to_keep=1)
            of_prefill.append(time.perf_counter() - started)
            of_decode.append(token_s(model))
    first, second = ([statistics.median(times[1:]) for times in both] for both in (prefills, decodes))
    return Cost(*first), Cost(*second)


def _found(shield: _Counting, model: SplitLlamaForCausalLM, size: float) -> float:
    """The share of rows with an error of this size, in random directions and operations, that are found."""
    seen: list[tuple[WorkerOp, torch.Tensor]] = []
    cover = shield.cover

    def watch(op: WorkerOp) -> Covered:
        covered = cover(op)

        def uncover(told: torch.Tensor) -> torch.Tensor:
            seen.append((op, told.clone()))
            return covered.uncover(told)

        return Covered(op, uncover)

    shield.cover = watch  # type: ignore[method-assign]
    try:
        model(prompt_for(model, 32, 1), logits_to_keep=1)
    finally:
        shield.cover = cover  # type: ignore[method-assign]
    linear = [(op, told) for op, told in seen if op.operation in LINEARS]
    counted = shield.checks, shield.refused, shield.largest
    shield.checks = shield.refused = 0
    per_op = max(_CURVE_ROWS // len(linear), 1)
    for op, told in linear:
        rows = told.shape[1]
        wrong = torch.randn(told.shape[1:], dtype=torch.float32)
        lengths = torch.linalg.vector_norm(told[0].to(torch.float32), dim=1, keepdim=True)
        wrong *= size * lengths / torch.linalg.vector_norm(wrong, dim=1, keepdim=True)
        kept = min(per_op, rows)
        few = WorkerOp(op.operation, op.layer, (op.arguments[0][:, :kept],))
        shield.cover(few).uncover((told[:, :kept].to(torch.float32) + wrong[:kept]).to(told.dtype))
    shield.settle()
    share = shield.refused / shield.checks
    shield.checks, shield.refused, shield.largest = counted
    return share


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(_measure(msgspec.json.decode(sys.argv[1], type=ShieldJob))))
