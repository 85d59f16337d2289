"""What crosses between a split model and its worker: calls, tensors, control bytes; and how they fit an arena."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from llama_split import SplitLlamaForCausalLM
from llama_split.operations import BY_MODE, Geometry, Mode, calls_per_forward

from .conftest import Small, Worker
from .prompts import NEW_TOKENS, SHARED, difference, padded_prompts, prompt, single_prompt


def test_a_forward_makes_the_promised_number_of_calls(small: Small, split: SplitLlamaForCausalLM, mode: str) -> None:
    """4 L + 1, L + 1 or 1 call, for a prompt and for each token."""
    calls = calls_per_forward(Mode(mode), Geometry.of(small.unsplit.config))
    layers = small.unsplit.config.num_hidden_layers
    assert calls == {"fused": 4 * layers + 1, "layer": layers + 1, "stack": 1}[mode]
    before = split.statistics()
    split(prompt())
    assert difference(before, split.statistics(), "calls") == calls
    split._kept.end_sessions()
    before = split.statistics()
    split.generate(**single_prompt(), **SHARED, do_sample=False)
    ends = 1 if Mode(mode).worker_keeps_kv else 0  # the session's end is one call more
    assert difference(before, split.statistics(), "calls") == 16 * calls + ends


def test_the_tensors_that_cross_are_those_of_the_boundary(
    small: Small, split: SplitLlamaForCausalLM, mode: str
) -> None:
    """Bytes sent and received follow from ``operations`` alone; where the worker keeps the KV, positions are added."""
    geometry, tokens = Geometry.of(small.unsplit.config), 23
    before = split.statistics()
    split(prompt(tokens), logits_to_keep=1)
    after = split.statistics()
    sent = received = 0
    for operation in BY_MODE[Mode(mode)]:
        times = geometry.layers if operation.per_layer else 1
        sent += 4 * times * (tokens if operation.per_token_in else 1) * operation.input_width(geometry)
        received += 4 * times * (tokens if operation.per_token_out else 1) * operation.output_width(geometry)
    sent += 8 * tokens if Mode(mode).worker_keeps_kv else 0
    assert difference(before, after, "tensor_bytes_sent") == sent
    assert difference(before, after, "tensor_bytes_received") == received


def test_the_trusted_model_is_a_llama_with_embedding_and_norms_only(
    small: Small, split: SplitLlamaForCausalLM, mode: str
) -> None:
    """Its parameters are V × D of the embedding; but for stack mode D of the final norm; in fused mode 2 D a layer."""
    config = small.unsplit.config
    assert isinstance(split, LlamaForCausalLM)
    norms = {"fused": 1 + 2 * config.num_hidden_layers, "layer": 1, "stack": 0}[mode]
    expected = (config.vocab_size + norms) * config.hidden_size
    assert sum(parameter.numel() for parameter in split.parameters()) == expected
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in split.parameters())
    assert not any(buffer.is_meta for buffer in split.buffers())


def test_control_messages_stay_small_whatever_the_prompt(plain_split: SplitLlamaForCausalLM) -> None:
    """A call takes less than 1 KiB of control bytes, and a prompt ten times longer takes no more of them."""

    def control(tokens: int, new: int) -> tuple[float, int]:
        ids = prompt(tokens)
        before = plain_split.statistics()
        plain_split.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        after = plain_split.statistics()
        used = difference(before, after, "control_bytes_sent") + difference(before, after, "control_bytes_received")
        moved = difference(before, after, "tensor_bytes_sent") + difference(before, after, "tensor_bytes_received")
        return used / difference(before, after, "calls"), moved

    assert control(11, NEW_TOKENS)[0] < 1024
    (short, short_tensors), (long, long_tensors) = control(30, 1), control(300, 1)
    assert long < 1.2 * short
    assert long_tensors > 8 * short_tensors


def test_long_prompts_cross_a_tiny_arena_in_several_calls(plain: Small, plain_worker: Worker) -> None:
    """With 64 KiB of arena a prompt of 500 tokens gives the same tokens, in more calls."""
    ids = prompt(500)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    expected = plain.unsplit.generate(ids, **options, **SHARED)
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, arena_bytes=64 << 10) as split:
        assert torch.equal(split.generate(ids, **options, **SHARED), expected)
        calls = split.statistics().calls
        assert calls > 16 * calls_per_forward(Mode.FUSED, Geometry.of(plain.unsplit.config)) + 50
        torch.testing.assert_close(split(ids).logits, plain.unsplit(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", [Mode.LAYER, Mode.STACK])
@pytest.mark.parametrize("padded", [False, True])
def test_long_prompts_cross_a_tiny_arena_in_chunks_where_the_worker_attends(
    plain: Small, plain_worker: Worker, padded: bool, mode: Mode
) -> None:
    """There too a prompt may be longer than the arena holds: its tokens go in chunks, with the same result."""
    ids = prompt(500)
    mask = torch.ones_like(ids)
    if padded:
        ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
        mask[1, :200] = 0
    options: dict[str, Any] = {"attention_mask": mask, "do_sample": False}
    expected = plain.unsplit.generate(ids, **options, **SHARED)
    with SplitLlamaForCausalLM.from_pretrained(
        plain.path, worker=plain_worker.address, mode=mode, arena_bytes=64 << 10
    ) as split:
        assert torch.equal(split.generate(ids, **options, **SHARED), expected)
        assert split.statistics().calls > 16 * calls_per_forward(mode, Geometry.of(plain.unsplit.config)) + 1
        whole = plain.unsplit(ids, attention_mask=mask).logits
        for last in (0, 1, 77):
            logits = split(ids, attention_mask=mask, logits_to_keep=last).logits
            torch.testing.assert_close(logits[0], whole[0, -last:], atol=1e-4, rtol=1e-4)


def test_logits_may_be_kept(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """Results of earlier forwards stay what they were while later ones run."""
    with torch.inference_mode():
        kept = [plain_split(prompt(30, seed=seed)).logits for seed in range(30)]
        for seed, logits in enumerate(kept):
            torch.testing.assert_close(logits, plain.unsplit(prompt(30, seed=seed)).logits, atol=1e-4, rtol=1e-4)


def test_snapshots_give_the_same_tokens(plain: Small, plain_worker: Worker, mode: str) -> None:
    """With private copies of every result, for callers that check them, nothing else changes."""
    expected = plain.unsplit.generate(**padded_prompts(), **SHARED, do_sample=False)
    with SplitLlamaForCausalLM.from_pretrained(
        plain.path, worker=plain_worker.address, mode=mode, snapshot=True
    ) as split:
        assert torch.equal(split.generate(**padded_prompts(), **SHARED, do_sample=False), expected)
