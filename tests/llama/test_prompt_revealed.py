"""Every split shows the worker the prompt: the first layer's input is the embedding, so a look-up gives the tokens.

The documents claim only this. A mask over activations would have to make these tests fail first.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llama_split import SplitLlamaForCausalLM
from llama_split.boundary.operations import EMBED, LAYER, QKV, REVEALED, STACK, Mode
from llama_split.checkpoint import EMBEDDING, LAYER_NORMS, Checkpoint, layer_name, open_checkpoint
from llama_split.checkpoint.demo import demo_model
from shmtransport import Server
from tests.support.hollow import hollow_handlers

FIRST = {Mode.OP: EMBED, Mode.FUSED: QKV, Mode.LAYER: LAYER, Mode.STACK: STACK}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """The demo model's file."""
    return open_checkpoint(str(demo_model()))


def nearest(seen_TD: torch.Tensor, embedding_VD: torch.Tensor) -> torch.Tensor:
    """The token whose embedding points in each row's direction: a norm changes a row's length only."""
    return (torch.nn.functional.normalize(seen_TD) @ torch.nn.functional.normalize(embedding_VD).T).argmax(-1)


@pytest.mark.parametrize("mode", list(Mode))
def test_a_worker_can_look_the_prompt_up(
    checkpoint: Checkpoint, serve: Callable[..., Server], address: str, mode: Mode
) -> None:
    """More than 95 of 100 random tokens of SmolLM2, from what the worker's first product receives and its weights.

    The worker has the weights of the norm, and the embedding where it is the output matrix too; where it isn't, it is
    in the model's public files.
    """
    received: list[torch.Tensor] = []
    handlers = hollow_handlers(checkpoint, torch.float32, torch.zeros)
    answer = handlers[FIRST[mode].name]

    def record(argument: torch.Tensor, **keywords: object) -> torch.Tensor:
        if keywords.get("layer", 0) == 0:
            received.append(argument.clone())
        result: torch.Tensor = answer(argument, **keywords)
        return result

    serve(**{**handlers, FIRST[mode].name: record})
    ids_T = torch.randint(checkpoint.geometry.vocab, (200,), generator=torch.Generator().manual_seed(24))
    with SplitLlamaForCausalLM.from_pretrained(
        checkpoint, worker=address, mode=mode, dtype="float32", arena_bytes=64 << 20
    ) as split:
        split(ids_T[None], logits_to_keep=1)
    seen = received[0][0]
    if mode is not Mode.OP:
        norm = layer_name(0, LAYER_NORMS[0])
        weights = checkpoint.load([norm, EMBEDDING], torch.float32, torch.device("cpu"))
        seen = nearest(seen / weights[norm] if mode is Mode.FUSED else seen, weights[EMBEDDING])
    assert (seen == ids_T).float().mean() > 0.95
    assert "the prompt and the generated text" in REVEALED[mode]
