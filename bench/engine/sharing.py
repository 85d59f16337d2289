"""Two workers that share a model's layers: how close a prompt's time comes to the bound that the slower one sets.

The bound is the time that the slower worker takes for its layers of all chunks, one chunk after the other, while
nothing else runs: no division of the same work can take less. Each worker has a core to itself, and one thread.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llama_split import SplitLlamaForCausalLM
from llama_split.boundary.choices import DTYPES
from llama_split.boundary.division import layers_text
from llama_split.boundary.operations import Mode
from llama_split.checkpoint import Checkpoint, open_checkpoint
from llama_split.checkpoint.demo import demo_model
from llama_split.commands.footprint import footprint
from llama_split.placement.local import WorkerProcess


@dataclass(frozen=True)
class Shared:
    """Medians, in seconds, of a prompt's forward over two workers.

    Attributes:
        mode: layer or stack.
        chunks: into how many the prompt is divided.
        workers: each worker's time for its layers of all chunks, while nothing else runs.
        in_turn: the forward in one chunk, so that only one worker computes at a time.
        together: the forward in chunks.
    """

    mode: str
    chunks: int
    workers: tuple[float, float]
    in_turn: float
    together: float

    @property
    def ratio(self) -> float:
        """The time together in units of the bound."""
        return self.together / max(self.workers)


def measure_sharing(modes: Sequence[str], pipelines: Sequence[int], tokens: int, repeats: int) -> Iterator[Shared]:
    """Measure the demo's model in float32, with a prompt of this length."""
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        checkpoint = open_checkpoint(str(demo_model()))
        float32 = DTYPES["float32"]
        shares = footprint(checkpoint.outline, Mode.STACK, float32, float32, tokens, (None, None)).shares
        workers = [
            stack.enter_context(
                WorkerProcess(["--model", str(demo_model()), "--threads", "1", "--layers", layers_text(share.layers)])
            )
            for share in shares
        ]
        for worker in workers:
            worker.wait_until_ready()
        addresses = [worker.address for worker in workers]
        ids = torch.randint(100, checkpoint.geometry.vocab - 100, (1, tokens))
        for mode in modes:
            with _open(checkpoint, addresses, mode, 1) as whole, torch.inference_mode():
                _pin(whole)
                in_turn = statistics.median(_seconds(whole, ids) for _ in range(repeats + 1))
                for pipeline in pipelines:
                    with _open(checkpoint, addresses, mode, pipeline) as split:
                        together = []
                        alone = []
                        for _ in range(repeats + 1):  # the first is the warm-up; the two take turns
                            together.append(_seconds(split, ids))
                            alone.append(_alone(whole, ids, pipeline * len(workers)))
                    yield Shared(
                        mode,
                        pipeline * len(workers),
                        tuple(map(statistics.median, zip(*alone[1:], strict=True))),
                        in_turn,
                        statistics.median(together[1:]),
                    )


def _open(checkpoint: Checkpoint, addresses: list[str], mode: str, pipeline: int) -> SplitLlamaForCausalLM:
    return SplitLlamaForCausalLM.from_pretrained(
        checkpoint,
        worker=addresses,
        mode=mode,
        dtype="float32",
        channel="doorbell",
        pipeline=pipeline,
    )


def _pin(split: SplitLlamaForCausalLM) -> None:
    """Give each worker a core of its own."""
    for core, worker in zip(sorted(os.sched_getaffinity(0)), split.workers, strict=False):
        for thread in os.listdir(f"/proc/{worker.client.server_pid}/task"):
            os.sched_setaffinity(int(thread), {core})


def _seconds(split: SplitLlamaForCausalLM, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    split(ids, logits_to_keep=1)
    return time.perf_counter() - started


def _alone(split: SplitLlamaForCausalLM, ids: torch.Tensor, chunks: int) -> list[float]:
    """The seconds of each worker's calls, if the chunks follow each other."""
    before = [worker.client.statistics().call_seconds for worker in split.workers]
    cache = split.new_cache(ids.shape[1])
    for chunk in ids.tensor_split(chunks, dim=1):
        split(chunk, past_key_values=cache, logits_to_keep=1)
    after = [worker.client.statistics().call_seconds for worker in split.workers]
    return [later - earlier for earlier, later in zip(before, after, strict=True)]
