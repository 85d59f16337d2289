"""What crosses between a split model and its worker: calls, tensors, control bytes; and how they fit an arena."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from llama_split import SplitLlamaForCausalLM
from llama_split.boundary.geometry import Geometry
from llama_split.boundary.operations import Mode
from llama_split.boundary.traffic import calls_per_forward, forward_sizes, forward_traffic
from tests.support.llamas import Small, Worker
from tests.support.prompts import NEW_TOKENS, SHARED, difference, padded_prompts, prompt, single_prompt


def test_a_forward_makes_the_promised_number_of_calls(small: Small, split: SplitLlamaForCausalLM, mode: str) -> None:
    """6 L + 2, 4 L + 1, L + 1 or 1 call, for a prompt and for each token."""
    calls = calls_per_forward(Mode(mode), Geometry.of(small.unsplit.config))
    layers = small.unsplit.config.num_hidden_layers
    assert calls == {"op": 6 * layers + 2, "fused": 4 * layers + 1, "layer": layers + 1, "stack": 1}[mode]
    before = split.statistics()
    split(prompt())
    assert difference(before, split.statistics(), "calls") == calls
    split._sessions.end_sessions()
    before = split.statistics()
    split.generate(**single_prompt(), **SHARED, do_sample=False)
    ends = 1 if Mode(mode).worker_keeps_kv else 0  # the session's end is one call more
    assert difference(before, split.statistics(), "calls") == 16 * calls + ends


def test_the_tensors_that_cross_are_those_of_the_boundary(
    small: Small, split: SplitLlamaForCausalLM, mode: str
) -> None:
    """Bytes sent and received follow from ``operations`` alone, in a prompt and in a token after it."""
    geometry, tokens = Geometry.of(small.unsplit.config), 23
    cache = split.new_cache()
    for new, cached in ((tokens, 0), (1, tokens)):
        sizes = forward_sizes(geometry, new, cached=cached)
        expected = forward_traffic(Mode(mode), geometry, sizes, torch.float32)
        before = split.statistics()
        split(prompt(new), logits_to_keep=1, past_key_values=cache)
        after = split.statistics()
        assert difference(before, after, "tensor_bytes_sent") == expected.sent
        assert difference(before, after, "tensor_bytes_received") == expected.received
        assert difference(before, after, "calls") == expected.calls


def test_the_originals_figures_are_those_of_the_op_split() -> None:
    """Llama-3.2-1B, 1024 tokens, float32: 98 calls, 3328 MiB and 16 KiB sent, 3656.5 MiB received."""
    geometry = Geometry(layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, intermediate=8192, vocab=128256)
    found = forward_traffic(Mode.OP, geometry, forward_sizes(geometry, 1024), torch.float32)
    assert found.calls == 98
    assert found.sent == (3328 << 20) + (16 << 10)
    assert round(found.received / 2**20, 1) == 3656.5


@pytest.mark.parametrize("mode", [Mode.FUSED, Mode.STACK])
def test_nothing_is_copied_but_small_integers(plain_split: SplitLlamaForCausalLM, mode: str) -> None:
    """Tensors are computed in the arena they are sent from; only positions, where they cross, are copied."""
    before = plain_split.statistics()
    plain_split(prompt(30), logits_to_keep=1)
    positions = 8 * 30 if Mode(mode).worker_keeps_kv else 0
    assert difference(before, plain_split.statistics(), "bytes_copied") == positions


def test_the_worker_copies_no_result(plain_worker: Worker, plain_split: SplitLlamaForCausalLM) -> None:
    """Every operation computes into the reply arena."""
    before = plain_worker.server.statistics()
    plain_split.generate(**single_prompt(), **SHARED, do_sample=False)
    after = plain_worker.server.statistics()
    assert difference(before, after, "tensor_bytes_sent") > 0
    assert difference(before, after, "bytes_copied") == 0


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_a_narrower_wire_halves_the_bytes_and_little_else(
    plain: Small, plain_worker: Worker, mode: str, wire: str
) -> None:
    """With float32 arithmetic and a 16-bit wire, activations take half the bytes and logits stay within roundings."""
    ids = prompt(20)
    with (
        SplitLlamaForCausalLM.from_pretrained(
            plain.path, worker=plain_worker.address, mode=mode, wire_dtype=wire
        ) as split,
        torch.inference_mode(),
    ):
        geometry = Geometry.of(plain.unsplit.config)
        expected = forward_traffic(Mode(mode), geometry, forward_sizes(geometry, 20), torch.bfloat16)
        before = split.statistics()
        split(ids, logits_to_keep=1)
        assert difference(before, split.statistics(), "tensor_bytes_sent") == expected.sent
        assert difference(before, split.statistics(), "tensor_bytes_received") == expected.received
        logits, right = split(ids).logits, plain.unsplit(ids).logits
        assert logits.dtype == torch.float32
        # A crossing rounds by half of 2^-8 or 2^-11: allow a unit for each call, whose roundings follow one another.
        unit = 2**-8 if wire == "bfloat16" else 2**-11
        assert (logits - right).abs().max() <= max(expected.calls, 8) * unit * right.abs().max()
        assert split.generate(**single_prompt(), **SHARED, do_sample=False).shape == (1, 11 + 16)


def test_the_trusted_model_is_a_llama_with_embedding_and_norms_only(
    small: Small, split: SplitLlamaForCausalLM, mode: str
) -> None:
    """Its parameters are V × D of the embedding, but in op mode; D of the final norm, but in stack mode; norms."""
    config = small.unsplit.config
    assert isinstance(split, LlamaForCausalLM)
    all_norms = 1 + 2 * config.num_hidden_layers
    rows = {"op": all_norms, "fused": config.vocab_size + all_norms, "layer": config.vocab_size + 1}
    expected = rows.get(mode, config.vocab_size) * config.hidden_size
    assert sum(parameter.numel() for parameter in split.parameters()) == expected
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in split.parameters())
    assert not any(buffer.is_meta for buffer in split.buffers())


def test_control_messages_stay_small_whatever_the_prompt(plain_split: SplitLlamaForCausalLM) -> None:
    """A call takes less than 1 KiB of control bytes, and a prompt ten times longer doesn't need more."""

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


@pytest.mark.parametrize("mode", [Mode.OP, Mode.FUSED])
def test_long_prompts_cross_a_tiny_arena_in_several_calls(plain: Small, plain_worker: Worker, mode: Mode) -> None:
    """With 128 KiB of arena a prompt of 500 tokens gives the same tokens, in more calls."""
    ids = prompt(500)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    expected = plain.unsplit.generate(ids, **options, **SHARED)
    with SplitLlamaForCausalLM.from_pretrained(
        plain.path, worker=plain_worker.address, mode=mode, arena_bytes=128 << 10
    ) as split:
        assert torch.equal(split.generate(ids, **options, **SHARED), expected)
        calls = split.statistics().calls
        assert calls > 16 * calls_per_forward(mode, Geometry.of(plain.unsplit.config)) + 50
        torch.testing.assert_close(split(ids).logits, plain.unsplit(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", [Mode.LAYER, Mode.STACK])
@pytest.mark.parametrize("padded", [False, True])
def test_long_prompts_cross_a_tiny_arena_in_chunks_where_the_worker_attends(
    plain: Small, plain_worker: Worker, padded: bool, mode: Mode
) -> None:
    """Here too a prompt may be longer than the arena holds: its tokens go in chunks, with the same result."""
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


@pytest.mark.parametrize(("arena_kib", "chunks"), [(100, 11), (140, 6)])
def test_a_wide_batchs_prompt_is_not_cut_for_its_logits_sake(
    plain: Small, plain_worker: Worker, arena_kib: int, chunks: int
) -> None:
    """In stack mode only the last tokens' logits are large: where they don't fit one call, the rest still does."""
    ids = prompt(12, batch=60)
    with (
        SplitLlamaForCausalLM.from_pretrained(
            plain.path, worker=plain_worker.address, mode="stack", arena_bytes=arena_kib << 10
        ) as split,
        torch.inference_mode(),
    ):
        before = split.statistics()
        logits = split(ids, logits_to_keep=1).logits
        assert difference(before, split.statistics(), "calls") == chunks + 1  # 12 × 60 rows fit no call, 60 do
        torch.testing.assert_close(logits, plain.unsplit(ids, logits_to_keep=1).logits, atol=1e-4, rtol=1e-4)


def test_logits_may_be_kept(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """Results of earlier forwards stay what they were while later ones run."""
    with torch.inference_mode():
        kept = [plain_split(prompt(30, seed=seed)).logits for seed in range(12)]
        for seed, logits in enumerate(kept):
            torch.testing.assert_close(logits, plain.unsplit(prompt(30, seed=seed)).logits, atol=1e-4, rtol=1e-4)


def test_snapshots_give_the_same_tokens(plain: Small, plain_worker: Worker, mode: str) -> None:
    """Private copies of every result, for callers that check them, change nothing else."""
    expected = plain.unsplit.generate(**padded_prompts(), **SHARED, do_sample=False)
    with SplitLlamaForCausalLM.from_pretrained(
        plain.path, worker=plain_worker.address, mode=mode, snapshot=True
    ) as split:
        assert torch.equal(split.generate(**padded_prompts(), **SHARED, do_sample=False), expected)
