"""In 16 bits the split model is as good as the unsplit one: perplexity of the demo model on a fixed text."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from llama_split import SplitLlamaForCausalLM
from llama_split.boundary.compute import DTYPES
from llama_split.checkpoint import Checkpoint
from llama_split.checkpoint.demo import demo_model
from tests.support.llamas import Worker, worker_in_thread

# The project's licence: a fixed text, long enough for the roundings of a dtype to average out. A CPU takes long for
# float16, whose roundings are finer.
TEXT = (Path(__file__).parent.parent.parent / "LICENSE").read_text()
CHARACTERS = {"bfloat16": 1200, "float16": 600}


@dataclass(frozen=True)
class Half:
    """A dtype of 16 bits: a worker that computes in it, a text's tokens [1, T], the unsplit model's surprise [T-1]."""

    worker: Worker
    ids: torch.Tensor
    expected: torch.Tensor


@pytest.fixture(scope="module")
def halves(smollm2_tokenizer: PreTrainedTokenizerBase, unsplit_smollm2: LlamaForCausalLM) -> Iterator[dict[str, Half]]:
    """What there is for each dtype."""
    made = {}
    with contextlib.ExitStack() as workers:
        for name, characters in CHARACTERS.items():
            worker = workers.enter_context(worker_in_thread(demo_model(), DTYPES[name]))
            ids: torch.Tensor = smollm2_tokenizer(TEXT[:characters], return_tensors="pt")["input_ids"]
            made[name] = Half(worker, ids, surprise(copy.deepcopy(unsplit_smollm2).to(DTYPES[name]), ids))
        yield made


def surprise(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each token after the first [T-1]; perplexity is the exponential of its mean."""
    with torch.inference_mode():
        logits = model(ids).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


# A CPU takes long for either, and longest for bfloat16: each split in one of them.
@pytest.mark.parametrize(
    ("dtype", "mode"), [("bfloat16", "fused"), *(("float16", mode) for mode in ("op", "layer", "stack"))]
)
def test_perplexity_is_within_half_a_percent(
    smollm2_checkpoint: Checkpoint, halves: dict[str, Half], dtype: str, mode: str
) -> None:
    """In every split and both dtypes, if not in all pairs; and it is that of a model that knows English.

    Both models round, each in its own way, and a short text does not average that out: what it leaves is the standard
    error of the mean difference, of which two are allowed for.
    """
    half = halves[dtype]
    with SplitLlamaForCausalLM.from_pretrained(
        smollm2_checkpoint, worker=half.worker.address, mode=mode, dtype=dtype
    ) as split:
        difference = surprise(split, half.ids) - half.expected
    assert float(half.expected.mean().exp()) < 20
    left = 2 * float(difference.std()) / len(difference) ** 0.5
    assert left < 0.02, "the text is too short to tell anything"
    assert abs(float(difference.mean())) < 0.005 + left
