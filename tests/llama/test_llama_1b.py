"""Llama-3.2-1B at full size, with a worker without weights: what crosses, and what the trusted side holds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_split import SplitLlamaForCausalLM
from llama_split.checkpoint.synthetic import RandomCheckpoint
from shmtransport import Server
from shmtransport.units import MIB
from tests.support.hollow import hollow_handlers
from tests.support.process import ROOT, Process

SCRIPTS = ROOT / "tests/support/processes"
TOKENS = 1024

Serve = Callable[..., Server]


def serve_hollow(serve: Serve, checkpoint: RandomCheckpoint, dtype: torch.dtype) -> None:
    """Serve a worker of this model that answers with zeros, made in the reply arena."""
    server: list[Server] = []
    handlers = hollow_handlers(checkpoint, dtype, lambda shape: server[0].empty(shape, dtype).zero_())
    server.append(serve(**handlers))


def test_a_forward_of_op_moves_what_the_original_moved(serve: Serve, address: str) -> None:
    """98 calls, 3328 MiB and 16 KiB sent, 3656.5 MiB received, measured: float32, 1024 tokens, one token's logits."""
    checkpoint = RandomCheckpoint("llama-3.2-1b")
    serve_hollow(serve, checkpoint, torch.float32)
    with (
        SplitLlamaForCausalLM.from_pretrained(checkpoint, worker=address, mode="op", dtype="float32") as split,
        torch.inference_mode(),
    ):
        before = split.statistics()
        logits = split(torch.arange(TOKENS)[None], logits_to_keep=1).logits
        after = split.statistics()
        assert logits.shape == (1, 1, 128256)
        assert after.calls - before.calls == 98
        assert after.tensor_bytes_sent - before.tensor_bytes_sent == (3328 << 20) + (16 << 10)
        received = after.tensor_bytes_received - before.tensor_bytes_received
        assert round(received / 2**20, 1) == 3656.5
        assert after.bytes_copied - before.bytes_copied == 8 * TOKENS  # the ids, which are not made in the arena


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_trusted_side_holds_little_more_than_the_embedding(serve: Serve, address: str, tmp_path: Path) -> None:
    """Peak resident memory in fused mode, bfloat16, imports included: the embedding and less than 400 MiB.

    Loading itself takes no more than a few blocks beside its result.
    """
    serve_hollow(serve, RandomCheckpoint("llama-3.2-1b"), torch.bfloat16)
    # torch imports NVIDIA's packages where they are installed, which is 11 MiB; a trusted side without a GPU has none.
    without_gpu = tmp_path / "cuda"
    without_gpu.mkdir()
    (without_gpu / "__init__.py").write_text("raise ModuleNotFoundError('no GPU here', name='cuda')\n")
    environment = {**Process.environment(), "OMP_NUM_THREADS": "2", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    output = subprocess.run(
        [sys.executable, str(SCRIPTS / "trusted_memory.py"), address],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    ).stdout
    imported, loaded, peak, embedding = map(int, output.split())
    assert embedding == 128256 * 2048 * 2 == 501 * MIB
    assert loaded - imported < embedding + 40 * MIB
    assert peak < embedding + 400 * MIB
