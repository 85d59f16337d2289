"""In 16 bits a split model is as good a model as the unsplit one is: perplexity of the demo model on a fixed text."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from llama_split import SplitLlamaForCausalLM
from llama_split.checkpoint import Checkpoint, open_checkpoint
from llama_split.config import DTYPES
from llama_split.settings import demo_model

from .conftest import Worker, worker_in_thread

# The project's licence: a fixed text, long enough for roundings to average out.
TEXT = (Path(__file__).parent.parent.parent / "LICENSE").read_text()[:3500]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """The demo model's file."""
    return open_checkpoint(str(demo_model()))


@pytest.fixture(scope="module")
def ids(checkpoint: Checkpoint) -> torch.Tensor:
    """The text's tokens [1, T]."""
    tokens: torch.Tensor = checkpoint.tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    return tokens


@pytest.fixture(scope="module")
def half(request: pytest.FixtureRequest) -> Iterator[tuple[str, Worker]]:
    """A dtype of 16 bits, and a worker that computes in it."""
    with worker_in_thread(demo_model(), DTYPES[request.param]) as worker:
        yield request.param, worker


@pytest.fixture(scope="module")
def expected(half: tuple[str, Worker], unsplit_smollm2: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """The unsplit model's perplexity in this dtype."""
    return perplexity(copy.deepcopy(unsplit_smollm2).to(DTYPES[half[0]]), ids)


def perplexity(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """The exponential of the mean negative log-likelihood of each token after the first."""
    with torch.inference_mode():
        logits = model(ids).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp())


# A CPU takes long for float16: there, the splits that are least alike.
@pytest.mark.parametrize(
    ("half", "mode"),
    [
        *(("bfloat16", mode) for mode in ("op", "fused", "layer", "stack")),
        *(("float16", mode) for mode in ("fused", "stack")),
    ],
    indirect=["half"],
)
def test_perplexity_is_within_half_a_percent(
    checkpoint: Checkpoint, half: tuple[str, Worker], expected: float, ids: torch.Tensor, mode: str
) -> None:
    """In every split and both 16-bit dtypes, and it is that of a model that knows English."""
    dtype, worker = half
    with SplitLlamaForCausalLM.from_pretrained(checkpoint, worker=worker.address, mode=mode, dtype=dtype) as split:
        found = perplexity(split, ids)
    assert expected < 20
    assert abs(found / expected - 1) < 0.005, f"{found} where the unsplit model has {expected}"
