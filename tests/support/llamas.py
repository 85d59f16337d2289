"""Small random Llamas, and workers that serve them in a thread."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_split.checkpoint import open_checkpoint
from llama_split.worker.integer_weights import IntegerWeights
from llama_split.worker.linear_service import IntegerService
from llama_split.worker.service import Service
from llama_split.worker.sessions import SessionLimits
from llama_split.worker.weights import Weights
from shmtransport import Server

BASE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-tied": {"tie_word_embeddings": True},
    "ungrouped-untied": {"num_key_value_heads": 4},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "wide-heads-llama3-rope": {
        "head_dim": 24,
        "num_key_value_heads": 1,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-3,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}


def random_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A small Llama whose every parameter, norms and biases included, is random, so that a forgotten one shows."""
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **overrides}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.3 if parameter.dim() == 1 else 2.0 * parameter.shape[-1] ** -0.5))
    return model.eval()


@dataclass(frozen=True)
class Small:
    """A small model on disk, and the same one unsplit."""

    path: Path
    unsplit: LlamaForCausalLM


@dataclass(frozen=True)
class Worker:
    """A worker in a thread of this process."""

    address: str
    server: Server
    service: Service

    def sessions_become(self, count: int, timeout_s: float = 2.0) -> bool:
        """Whether the number of KV sessions gets to ``count`` in time."""
        deadline = time.monotonic() + timeout_s
        while len(self.service.sessions) != count and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(self.service.sessions) == count


@contextlib.contextmanager
def worker_in_thread(
    path: Path,
    dtype: torch.dtype = torch.float32,
    limits: SessionLimits | None = None,
    layers: range | None = None,
    *,
    embedding: bool = True,
) -> Iterator[Worker]:
    """Serve the model at ``path``, or these of its layers, for the length of the block."""
    checkpoint = open_checkpoint(str(path))
    with _listening() as server:
        weights = Weights(checkpoint, dtype, torch.device("cpu"), embedding=embedding, layers=layers)
        service = Service(server, weights, checkpoint, limits)
        with _answering(server):
            yield Worker(server.address, server, service)


@dataclass(frozen=True)
class IntegerWorker:
    """A worker in a thread of this process that computes with whole numbers."""

    address: str
    server: Server
    weights: IntegerWeights


@contextlib.contextmanager
def integer_worker_in_thread(path: Path, layers: range | None = None) -> Iterator[IntegerWorker]:
    """Serve the model at ``path`` in 8 bits, or these of its layers, for the length of the block."""
    checkpoint = open_checkpoint(str(path))
    with _listening() as server:
        weights = IntegerWeights(checkpoint, torch.device("cpu"), layers=layers)
        IntegerService(server, weights, checkpoint)
        with _answering(server):
            yield IntegerWorker(server.address, server, weights)


@contextlib.contextmanager
def _listening() -> Iterator[Server]:
    """A server at an address of its own."""
    directory = tempfile.mkdtemp(prefix="split-test-")
    try:
        with Server(f"ipc://{directory}/worker.ipc") as server:
            yield server
    finally:
        shutil.rmtree(directory)


@contextlib.contextmanager
def _answering(server: Server) -> Iterator[None]:
    """Have a thread answer calls."""

    def serve() -> None:
        torch.set_num_threads(1)  # a setting of each thread
        server.serve()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.stop()
        thread.join(10.0)
        assert not thread.is_alive(), "the worker did not stop"
