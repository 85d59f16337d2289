"""Rotary positions whose frequencies depend on the text's length equal the unsplit model's, whichever side rotates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llama_split import SplitLlamaForCausalLM
from llama_split.model.rotary import Rotary, rotate
from llama_split.trusted.transformers_versions import CACHE_NAME
from llama_split.worker.sessions import SessionLimits
from shmtransport import RemoteError
from tests.support.llamas import Small, Worker, worker_in_thread
from tests.support.prompts import SHARED, prompt

OWN_LENGTH = 64
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {
        "max_position_embeddings": OWN_LENGTH,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    },
    "longrope": {
        "max_position_embeddings": 8 * OWN_LENGTH,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "factor": 8.0,
            "original_max_position_embeddings": OWN_LENGTH,
        },
    },
    "default": {"max_position_embeddings": OWN_LENGTH},
}
WAYS: dict[str, dict[str, Any]] = {
    "op": {"mode": "op"},
    "fused": {"mode": "fused"},
    "layer": {"mode": "layer"},
    "stack": {"mode": "stack"},
    "fused-in-parts": {"mode": "fused", "pipeline": 3},
    "layer-in-many-calls": {"mode": "layer", "arena_bytes": 32 << 10},
    "stack-in-many-calls": {"mode": "stack", "arena_bytes": 64 << 10},
}
TEXTS = [
    (prompt(length, batch=2, seed=turn), prompt(130, seed=50 + turn))
    for turn, length in enumerate((40, 100, 64, 70, 30, 65))
]
GENERATIONS: list[dict[str, Any]] = [
    {"input_ids": prompt(length), "attention_mask": torch.ones(1, length), **SHARED, **how, "do_sample": False}
    for length, how in (
        (58, {"max_new_tokens": 12}),
        (90, {"num_beams": 2, "max_new_tokens": 6}),
        (60, {"prompt_lookup_num_tokens": 4, "max_new_tokens": 10}),
        (100, {"prefill_chunk_size": 33, "max_new_tokens": 4}),
    )
]
KEPT = {name: options for name, options in WAYS.items() if options["mode"] in ("layer", "stack")}


@pytest.fixture(scope="module", params=ROPES)
def scaled(request: pytest.FixtureRequest, save_small: Callable[..., Small]) -> Small:
    """A small model for each kind of scaling."""
    return save_small(seed=21, **ROPES[request.param])


@pytest.fixture(scope="module")
def scaled_worker(scaled: Small) -> Iterator[Worker]:
    """A worker for that model."""
    with worker_in_thread(scaled.path) as running:
        yield running


@pytest.fixture(scope="module")
def narrow(scaled: Small) -> Iterator[Worker]:
    """A worker with room for one session, which any other session takes over."""
    with worker_in_thread(scaled.path, limits=SessionLimits(max_sessions=1, idle_s=0.0)) as running:
        yield running


def unsplit(small: Small) -> LlamaForCausalLM:
    """A freshly loaded model: transformers' rotary module remembers the lengths it has seen."""
    return LlamaForCausalLM.from_pretrained(small.path)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def right_logits(scaled: Small) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The logits that two unsplit models give, one for the texts and one for the others."""
    right, others_right = unsplit(scaled), unsplit(scaled)
    with torch.no_grad():
        return [(right(ids).logits, others_right(others).logits) for ids, others in TEXTS]


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@torch.no_grad()
def test_logits_are_the_unsplit_models_for_texts_of_any_length(
    scaled: Small,
    scaled_worker: Worker,
    right_logits: list[tuple[torch.Tensor, torch.Tensor]],
    options: dict[str, Any],
) -> None:
    """One after another, shorter and longer than the model's own length, while another client sends others."""
    with (
        SplitLlamaForCausalLM.from_pretrained(scaled.path, worker=scaled_worker.address, **options) as split,
        SplitLlamaForCausalLM.from_pretrained(scaled.path, worker=scaled_worker.address, **options) as other,
    ):
        for (ids, others), (right, others_right) in zip(TEXTS, right_logits, strict=True):
            assert_close(split(ids).logits, right)
            assert_close(other(others).logits, others_right)


@pytest.fixture(scope="module")
def right_texts(scaled: Small) -> list[torch.Tensor]:
    """What the unsplit model generates."""
    right = unsplit(scaled)
    return [right.generate(**inputs) for inputs in GENERATIONS]


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_generation_goes_on_beyond_the_models_own_length(
    scaled: Small, scaled_worker: Worker, right_texts: list[torch.Tensor], options: dict[str, Any]
) -> None:
    """It equals the unsplit model's, token by token, with beams, with rejected drafts and with chunked prompts."""
    with SplitLlamaForCausalLM.from_pretrained(scaled.path, worker=scaled_worker.address, **options) as split:
        for inputs, right in zip(GENERATIONS, right_texts, strict=True):
            assert torch.equal(split.generate(**inputs), right)


@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT)
@torch.no_grad()
def test_kv_is_built_again_with_the_frequencies_that_its_tokens_had(
    scaled: Small, narrow: Worker, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Two caches in turn on a worker with room for one, both growing beyond the model's own length."""
    caplog.set_level(logging.CRITICAL, "shmtransport")  # a record that is kept keeps what its traceback refers to
    right = unsplit(scaled)
    with SplitLlamaForCausalLM.from_pretrained(scaled.path, worker=narrow.address, **options) as split:
        mine, theirs = [split.new_cache() for _ in range(2)], [DynamicCache() for _ in range(2)]
        for turn in range(7):
            for index in range(2):
                ids = prompt(13 if turn % 3 else 7, seed=10 * turn + index)
                found = split(ids, **{CACHE_NAME: mine[index]}).logits
                assert_close(found, right(ids, **{CACHE_NAME: theirs[index]}).logits)
        mine[0].crop(-20)
        theirs[0].crop(-20)
        ids = prompt(3, seed=99)
        assert_close(split(ids, **{CACHE_NAME: mine[0]}).logits, right(ids, **{CACHE_NAME: theirs[0]}).logits)


def test_rotary_remembers_nothing(save_small: Callable[..., Small]) -> None:
    """The same positions give the same result after any other call; without a length it raises instead of guessing."""
    config = save_small(seed=21, **ROPES["dynamic"]).unsplit.config
    rotary = Rotary(config, torch.device("cpu"))
    positions = torch.arange(10)[None]
    short = rotary(positions, torch.float32, torch.full((10,), 10))
    long = rotary(positions, torch.float32, torch.full((10,), 200))
    assert not torch.equal(short[0], long[0])
    assert torch.equal(rotary(positions, torch.float32, torch.full((10,), 10))[0], short[0])
    mixed = rotary(positions, torch.float32, torch.tensor([10] * 4 + [200] * 6))
    assert torch.equal(mixed[1], torch.cat([short[1][:, :4], long[1][:, 4:]], dim=1))
    with pytest.raises(ValueError, match="length of the text"):
        rotary(positions, torch.float32)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("lengths", torch.ones(3, dtype=torch.int64)),
        ("lengths", torch.ones(4)),
        ("lengths", None),
        ("sequences", torch.zeros(1, 3, dtype=torch.int64)),
        ("padding", torch.ones(1, 4)),
        ("positions", torch.zeros(1, 4, dtype=torch.int32)),
        ("positions", torch.zeros(2, 4, dtype=torch.int64)),
    ],
    ids=str,
)
def test_a_worker_refuses_what_fits_no_forward(save_small: Callable[..., Small], name: str, wrong: Any) -> None:
    """The error for a client's mistake is its own, and its session is as before."""
    small = save_small(seed=21, **ROPES["dynamic"])
    with (
        worker_in_thread(small.path) as worker,
        SplitLlamaForCausalLM.from_pretrained(small.path, worker=worker.address, mode="layer") as split,
    ):
        hidden = torch.zeros(1, 4, 64)
        start = {"positions": torch.arange(4)[None], "padding": None, "past": 0, "select": None}
        right = {**start, "lengths": torch.full((4,), 4), "sequences": None}
        with pytest.raises(RemoteError, match=name if wrong is not None else "length of the text"):
            split.workers[0].client.call("layer", hidden, layer=0, session=1, start={**right, name: wrong})
        split.workers[0].client.call("layer", hidden, layer=0, session=1, start=right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_and_keys_turn_to_the_last_bit_as_in_transformers(dtype: torch.dtype) -> None:
    """Both are turned together here, by sines whose sign depends on the half."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256)
    positions_BT = torch.tensor([[0, 1, 5, 200], [7, 8, 9, 10]])
    query_BTHd, key_BTGd = torch.randn(2, 4, 4, 16).to(dtype), torch.randn(2, 4, 2, 16).to(dtype)
    cos_sin = LlamaRotaryEmbedding(config)(query_BTHd, positions_BT)
    expected = apply_rotary_pos_emb(query_BTHd.transpose(1, 2), key_BTGd.transpose(1, 2), *cos_sin)
    rotated_BTHd = rotate(
        torch.cat((query_BTHd, key_BTGd), dim=2), Rotary(config, torch.device("cpu"))(positions_BT, dtype)
    )
    torch.testing.assert_close(rotated_BTHd.transpose(1, 2), torch.cat(expected, dim=1), rtol=0, atol=0)
