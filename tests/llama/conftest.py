"""Fixtures of the llama tests: small random models, workers in threads, and the demo model once for all tests."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_split import SplitLlamaForCausalLM
from llama_split.checkpoint import open_checkpoint
from llama_split.launcher import WorkerProcess
from llama_split.operations import Mode
from llama_split.settings import demo_model
from llama_split.worker.kernels import Weights
from llama_split.worker.service import Service
from llama_split.worker.sessions import SessionLimits
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
    path: Path, dtype: torch.dtype = torch.float32, limits: SessionLimits | None = None
) -> Iterator[Worker]:
    """Serve the model at ``path`` for the length of the block."""
    directory = tempfile.mkdtemp(prefix="split-test-")
    checkpoint = open_checkpoint(str(path))
    try:
        with Server(f"ipc://{directory}/worker.ipc") as server:
            service = Service(
                server, Weights(checkpoint, dtype, torch.device("cpu"), embedding=True), checkpoint, limits
            )

            def serve() -> None:
                torch.set_num_threads(1)  # a setting of each thread
                server.serve()

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            try:
                yield Worker(server.address, server, service)
            finally:
                server.stop()
                thread.join(10.0)
                assert not thread.is_alive(), "the worker did not stop"
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are quicker on one thread, and two sides compute in turn on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def save_small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Small]:
    """Make a small random model and save it: ``save_small(seed, num_hidden_layers=…)``."""

    def save(seed: int = 0, **overrides: Any) -> Small:
        path = tmp_path_factory.mktemp("small")
        model = random_llama(seed, **overrides)
        model.save_pretrained(path)
        return Small(path, model)

    return save


@pytest.fixture(scope="session", params=VARIANTS)
def small(request: pytest.FixtureRequest, save_small: Callable[..., Small]) -> Small:
    """Each kind of small model in turn."""
    return save_small(**VARIANTS[request.param])


@pytest.fixture(scope="session")
def worker(small: Small) -> Iterator[Worker]:
    """A float32 worker for the small model."""
    with worker_in_thread(small.path) as running:
        yield running


@pytest.fixture(params=[mode.value for mode in Mode])
def mode(request: pytest.FixtureRequest) -> str:
    """Each split in turn."""
    chosen: str = request.param
    return chosen


@pytest.fixture
def split(small: Small, worker: Worker, mode: str) -> Iterator[SplitLlamaForCausalLM]:
    """The small model, split."""
    with SplitLlamaForCausalLM.from_pretrained(small.path, worker=worker.address, mode=mode) as model:
        yield model


@pytest.fixture(scope="session")
def plain(save_small: Callable[..., Small]) -> Small:
    """One small model, for rules that don't depend on the kind of model."""
    return save_small(seed=5)


@pytest.fixture(scope="session")
def plain_worker(plain: Small) -> Iterator[Worker]:
    """A float32 worker for the one small model."""
    with worker_in_thread(plain.path) as running:
        yield running


@pytest.fixture
def plain_split(plain: Small, plain_worker: Worker, mode: str) -> Iterator[SplitLlamaForCausalLM]:
    """The one small model, split."""
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode=mode) as model:
        yield model


@pytest.fixture
def layer_split(plain: Small, plain_worker: Worker) -> Iterator[SplitLlamaForCausalLM]:
    """The small model in layer mode, on a worker that has no sessions."""
    assert plain_worker.sessions_become(0)
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode="layer") as model:
        yield model


@pytest.fixture(scope="session")
def smollm2_starting() -> Iterator[WorkerProcess]:
    """A worker process for the demo model; it loads while this process goes on."""
    with WorkerProcess(["--model", str(demo_model()), "--dtype", "float32"]) as process:
        yield process


@pytest.fixture(scope="session")
def unsplit_smollm2() -> LlamaForCausalLM:
    """The demo model as transformers itself loads it from the GGUF file, in float32."""
    path = demo_model()
    return LlamaForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def smollm2_address(smollm2_starting: WorkerProcess, unsplit_smollm2: LlamaForCausalLM) -> str:
    """The address of a worker process that serves the demo model, ready."""
    smollm2_starting.wait_until_ready()
    return smollm2_starting.address
