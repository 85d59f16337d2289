"""Fixtures of the llama tests: small random models, workers in threads, and the demo model once for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llama_split import SplitLlamaForCausalLM
from llama_split.boundary.operations import Mode
from llama_split.checkpoint import Checkpoint, open_checkpoint
from llama_split.checkpoint.demo import demo_model
from tests.support.checkpoints import read_once
from tests.support.children import Child, Mother
from tests.support.commands import FORKED
from tests.support.llamas import VARIANTS, Small, Worker, random_llama, worker_in_thread
from tests.support.model_fixtures import by_doorbell, llama_mother, one_thread
from tests.support.process import Process
from tests.support.workers import Workers

__all__ = ["by_doorbell", "llama_mother", "one_thread"]

TINY_VOCABULARY = 2000  # a row of logits is 8000 bytes, more than the smallest arena


@dataclass(frozen=True)
class SmolLM2:
    """The demo model as transformers itself loads it from the GGUF file, in float32, and its tokenizer."""

    unsplit: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Starting:
    """A worker process that says when it is ready."""

    address: str
    process: Process


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


@pytest.fixture(scope="session", params=[mode.value for mode in Mode])
def lasting_split(request: pytest.FixtureRequest, plain: Small) -> Iterator[SplitLlamaForCausalLM]:
    """The one small model, split, with a worker of its own; for tests that leave it as it is."""
    with (
        worker_in_thread(plain.path) as running,
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=running.address, mode=request.param) as model,
    ):
        yield model


@pytest.fixture
def layer_split(plain: Small, plain_worker: Worker) -> Iterator[SplitLlamaForCausalLM]:
    """The small model in layer mode, on a worker that has no sessions."""
    assert plain_worker.sessions_become(0)
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode="layer") as model:
        yield model


@pytest.fixture(scope="session")
def smollm2_starting(llama_mother: Mother, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starting]:
    """A worker process for the demo model; it loads while the tests continue."""
    address = f"ipc://{tmp_path_factory.mktemp('smollm2')}/worker.ipc"
    process = Child(llama_mother, FORKED, "worker", "--bind", address, "--model", str(demo_model()))
    yield Starting(address, process)
    process.end()


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Checkpoint:
    """The demo model's file."""
    return open_checkpoint(str(demo_model()))


@pytest.fixture(scope="session")
def smollm2(smollm2_checkpoint: Checkpoint) -> SmolLM2:
    """What transformers makes of the demo model's file, which it reads once for both."""
    path = demo_model()
    with read_once():
        unsplit = LlamaForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
        return SmolLM2(unsplit.eval(), smollm2_checkpoint.tokenizer())


@pytest.fixture(scope="session")
def unsplit_smollm2(smollm2: SmolLM2) -> LlamaForCausalLM:
    """The demo model as transformers itself loads it."""
    return smollm2.unsplit


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: SmolLM2) -> PreTrainedTokenizerBase:
    """The demo model's tokenizer."""
    return smollm2.tokenizer


@pytest.fixture(scope="session")
def smollm2_address(smollm2_starting: Starting) -> str:
    """The address of a worker process that serves the demo model in float32, ready."""
    smollm2_starting.process.wait_until_ready()
    return smollm2_starting.address


@pytest.fixture(scope="module")
def workers(llama_mother: Mother, plain: Small, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Workers of the one small model, none of them started."""
    running = Workers(llama_mother, plain.path, f"ipc://{tmp_path_factory.mktemp('workers')}/w.ipc")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama of 32 positions with a tokenizer of whole words: "w0" … "w1999"."""
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(TINY_VOCABULARY)}, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)  # noqa: S106
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path
