"""Small random models: split or not, what ``generate`` and ``forward`` give is the same."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from llama_split import SplitLlamaForCausalLM, UnsupportedBySplit, WorkerMismatch
from llama_split.operations import BY_MODE, LM_HEAD, Geometry, Mode, calls_per_forward
from shmtransport import Statistics

from .conftest import Small, Worker, worker_in_thread

NEW_TOKENS = 40
LONG: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
SHARED: dict[str, Any] = {"max_new_tokens": 16, "pad_token_id": 0}


def prompt(tokens: int = 11, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Random token ids, none of them padding."""
    return torch.randint(2, 160, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded_prompts() -> dict[str, torch.Tensor]:
    """Three prompts of different lengths, padded on the left."""
    ids, mask = prompt(12, batch=3), torch.ones(3, 12, dtype=torch.int64)
    for row, padding in enumerate((5, 0, 9)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def single_prompt() -> dict[str, torch.Tensor]:
    ids = prompt()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def difference(before: Statistics, after: Statistics, field: str) -> int:
    """How much a counter grew."""
    grown: int = getattr(after, field) - getattr(before, field)
    return grown


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [single_prompt, padded_prompts])
def test_greedy_tokens_are_those_of_the_unsplit_model(
    small: Small, split: SplitLlamaForCausalLM, prompts: Callable[[], dict[str, torch.Tensor]]
) -> None:
    """For each kind of model, split and batch, every token of 40 is the same, padding on the left or not."""
    expected = small.unsplit.generate(**prompts(), **LONG, do_sample=False)
    tokens = split.generate(**prompts(), **LONG, do_sample=False)
    assert torch.equal(tokens, expected)
    assert len(set(expected[0, -NEW_TOKENS:].tolist())) > 3, "the random model repeats itself; nothing was tested"


@pytest.mark.parametrize("prompts", [single_prompt, padded_prompts])
def test_sampled_tokens_are_those_of_the_unsplit_model(
    plain: Small, plain_split: SplitLlamaForCausalLM, prompts: Callable[[], dict[str, torch.Tensor]]
) -> None:
    """With the same seed, sampling takes the same tokens."""
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95}
    torch.manual_seed(7)
    expected = plain.unsplit.generate(**prompts(), **SHARED, **options)
    torch.manual_seed(7)
    assert torch.equal(plain_split.generate(**prompts(), **SHARED, **options), expected)


@pytest.mark.parametrize("prompts", [single_prompt, padded_prompts])
def test_beam_search_finds_the_unsplit_models_sequences(
    plain: Small, plain_split: SplitLlamaForCausalLM, prompts: Callable[[], dict[str, torch.Tensor]]
) -> None:
    """Beams reorder the cache after every token, wherever it lives."""
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    expected = plain.unsplit.generate(**prompts(), **SHARED, **options)
    assert torch.equal(plain_split.generate(**prompts(), **SHARED, **options), expected)


def test_several_sequences_of_a_prompt_are_the_unsplit_models(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """``num_return_sequences`` samples a prompt several times."""
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(3)
    expected = plain.unsplit.generate(**padded_prompts(), **SHARED, **options)
    torch.manual_seed(3)
    assert torch.equal(plain_split.generate(**padded_prompts(), **SHARED, **options), expected)


def test_prompt_lookup_gives_the_greedy_tokens(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """Guessed tokens are checked several at a time and the wrong ones cropped from the cache: the tokens stay."""
    ids = prompt(6).repeat(1, 4)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    expected = plain.unsplit.generate(ids, **options, **SHARED)
    assert torch.equal(plain_split.generate(ids, **options, **SHARED, prompt_lookup_num_tokens=3), expected)


def test_an_assistant_model_gives_the_greedy_tokens(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """A smaller model here may guess for the split one."""
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, do_sample=False)
    assert torch.equal(
        plain_split.generate(**single_prompt(), **SHARED, do_sample=False, assistant_model=plain.unsplit), expected
    )


def test_generation_without_a_cache_gives_the_greedy_tokens(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """``use_cache=False`` computes everything anew for each token."""
    options: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    expected = plain.unsplit.generate(**padded_prompts(), **options)
    assert torch.equal(plain_split.generate(**padded_prompts(), **options, use_cache=False), expected)


def test_chunked_prefill_gives_the_greedy_tokens(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """A prompt may be taken in pieces."""
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, do_sample=False)
    tokens = plain_split.generate(**single_prompt(), **SHARED, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(tokens, expected)


def test_generation_stops_where_the_unsplit_model_does(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """An end-of-text token ends a row, and the other rows go on with padding for it."""
    free = plain.unsplit.generate(**padded_prompts(), **SHARED, do_sample=False)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": int(free[1, 12 + 6])}
    expected = plain.unsplit.generate(**padded_prompts(), **SHARED, **options)
    assert torch.equal(plain_split.generate(**padded_prompts(), **SHARED, **options), expected)
    assert not torch.equal(expected, free)


class AfterTokens(StoppingCriteria):  # type: ignore[misc]
    """Stops at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_a_stopping_criterion_of_ones_own_is_asked(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """``stopping_criteria`` end generation at the same token."""
    options: dict[str, Any] = {"do_sample": False, "stopping_criteria": StoppingCriteriaList([AfterTokens(20)])}
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, **options)
    tokens = plain_split.generate(**single_prompt(), **SHARED, **options)
    assert torch.equal(tokens, expected)
    assert tokens.shape[1] == 20


class Spelled:
    """The part of a tokenizer that streamers use: a token is spelled by its number."""

    def decode(self, ids: Any, **_kwargs: Any) -> str:
        return "".join(f"{int(token)} " for token in torch.as_tensor(ids).reshape(-1))


def test_a_text_streamer_prints_the_tokens(
    plain: Small, plain_split: SplitLlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is streamed are the unsplit model's tokens, in order."""
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, do_sample=False)
    plain_split.generate(
        **single_prompt(), **SHARED, do_sample=False, streamer=TextStreamer(Spelled(), skip_prompt=True)
    )
    assert capsys.readouterr().out.split() == [str(token) for token in expected[0, 11:].tolist()]


def test_an_iterator_streamer_is_fed_from_another_thread(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """Generation may run in a thread while this one reads the text."""
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, do_sample=False)
    streamer = TextIteratorStreamer(Spelled(), skip_prompt=True, timeout=30.0)
    options = {**single_prompt(), **SHARED, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=plain_split.generate, kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join(30.0)
    assert "".join(pieces).split() == [str(token) for token in expected[0, 11:].tolist()]
    assert len(pieces) > 10


def test_a_second_turn_goes_on_with_the_firsts_cache(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """A returned cache, passed back with a longer text, gives what the unsplit model gives without one."""

    def turns(model: LlamaForCausalLM, cache: Any) -> torch.Tensor:
        ids = prompt()
        for turn in range(2):
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **SHARED,
                do_sample=False,
                return_dict_in_generate=True,
                past_key_values=cache,
            )
            cache = output.past_key_values if cache is not None else None
            ids = torch.cat([output.sequences, prompt(5, seed=turn)], dim=1)
        return ids

    expected = turns(plain.unsplit, None)
    assert torch.equal(turns(plain_split, plain_split.new_cache()), expected)
    before = plain_split.statistics()
    cache = plain_split.new_cache()
    turns(plain_split, cache)
    sent = difference(before, plain_split.statistics(), "tensor_bytes_sent")
    before = plain_split.statistics()
    turns(plain_split, None)
    assert sent < difference(before, plain_split.statistics(), "tensor_bytes_sent"), "the cache was not used"


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_of_a_direct_call_are_those_of_the_unsplit_model(
    small: Small, split: SplitLlamaForCausalLM, use_cache: bool, padded: bool
) -> None:
    """``model(ids)`` with or without padding and cache, every position that is no padding within 1e-4."""
    inputs = padded_prompts() if padded else {"input_ids": prompt(17, batch=2)}
    with torch.inference_mode():
        expected = small.unsplit(**inputs, use_cache=use_cache)
        output = split(**inputs, use_cache=use_cache)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(output.logits[real], expected.logits[real], atol=1e-4, rtol=1e-4)
    assert (output.past_key_values is None) is (expected.past_key_values is None)


def test_the_loss_is_that_of_the_unsplit_model(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """``labels`` give the same loss, positions marked -100 left out."""
    ids = prompt(17, batch=2)
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.inference_mode():
        expected, output = (model(ids, labels=labels) for model in (plain.unsplit, plain_split))
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 9])])
def test_only_the_logits_asked_for_cross(plain: Small, plain_split: SplitLlamaForCausalLM, keep: Any) -> None:
    """``logits_to_keep`` selects positions, by number from the end or by index."""
    with torch.inference_mode():
        expected, output = (model(prompt(12), logits_to_keep=keep) for model in (plain.unsplit, plain_split))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_embeddings_may_be_passed_for_ids(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """``inputs_embeds`` replaces the lookup."""
    with torch.inference_mode():
        embedded = plain.unsplit.model.embed_tokens(prompt(9))
        expected, output = (model(inputs_embeds=embedded) for model in (plain.unsplit, plain_split))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_a_cache_of_a_direct_call_may_be_continued_and_edited(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """Reordered, repeated, cropped and selected, a cache gives the logits that a dynamic one gives."""

    def run(model: LlamaForCausalLM, cache: Any) -> Iterator[torch.Tensor]:
        cache = model(prompt(9, batch=3), past_key_values=cache, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        yield model(prompt(4, batch=3, seed=2), past_key_values=cache).logits
        cache.crop(-3)
        yield model(prompt(1, batch=3, seed=3), past_key_values=cache).logits
        cache.batch_repeat_interleave(2)
        cache.crop(-1)
        yield model(prompt(2, batch=6, seed=4), past_key_values=cache).logits
        cache.batch_select_indices(torch.tensor([5, 1]))
        cache.reorder_cache(torch.tensor([1, 0]))
        yield model(prompt(2, batch=2, seed=5), past_key_values=cache).logits

    with torch.inference_mode():
        for found, expected in zip(run(plain_split, None), run(plain.unsplit, DynamicCache()), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_reset_cache_takes_another_batch(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """After ``reset`` a cache is as new, whatever was asked of it before."""
    cache = plain_split.new_cache()
    with torch.inference_mode():
        plain_split(prompt(9, batch=3), past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.reset()
        output = plain_split(prompt(5), past_key_values=cache)
        expected = plain.unsplit(prompt(5))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_copies_of_a_prompts_cache_are_right_or_refused(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """Two continuations of one copied cache, in turn, never see each other's tokens: transformers' prefix reuse."""
    prefix = prompt(9)
    with torch.inference_mode():
        cache = plain_split(prefix, use_cache=True).past_key_values
        try:
            caches = [copy.deepcopy(cache) for _ in range(2)]
        except (UnsupportedBySplit, TypeError):
            return
        texts = [prefix, prefix]
        for seed in (20, 30):
            for row in range(2):
                ids = prompt(3, seed=seed + row)
                texts[row] = torch.cat([texts[row], ids], dim=1)
                output = plain_split(ids, past_key_values=caches[row])
                expected = plain.unsplit(texts[row], logits_to_keep=3)
                torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # A rounding is half of 2^-8 or 2^-11 of a value. A few dozen follow one another in three layers, in another order
    # in a stacked product than in three: allow eight units in the last place of the largest logit.
    [pytest.param(torch.bfloat16, 8 * 2**-8, id="bfloat16"), pytest.param(torch.float16, 8 * 2**-11, id="float16")],
)
def test_half_precision_logits_are_near_those_of_the_unsplit_model(
    plain: Small, mode: str, dtype: torch.dtype, tolerance: float
) -> None:
    """In the same dtype on both sides, logits differ by roundings only, and are of this dtype."""
    unsplit = LlamaForCausalLM.from_pretrained(plain.path, dtype=dtype)
    with (
        worker_in_thread(plain.path, dtype) as worker,
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=worker.address, mode=mode, dtype=dtype) as split,
        torch.inference_mode(),
    ):
        expected, output = (model(prompt(17, batch=2)).logits for model in (unsplit, split))
        assert output.dtype == dtype
        error = (output.float() - expected.float()).abs().max()
        assert error <= tolerance * expected.float().abs().max()
        assert split.generate(**single_prompt(), **SHARED, do_sample=False).shape == (1, 11 + 16)


# --- what crosses -----------------------------------------------------------------------------------------------------


def test_a_forward_makes_the_promised_number_of_calls(small: Small, split: SplitLlamaForCausalLM, mode: str) -> None:
    """4 L + 1 or L + 1 calls, for a prompt and for each token."""
    calls = calls_per_forward(Mode(mode), Geometry.of(small.unsplit.config))
    layers = small.unsplit.config.num_hidden_layers
    assert calls == {"fused": 4 * layers + 1, "layer": layers + 1}[mode]
    before = split.statistics()
    split(prompt())
    assert difference(before, split.statistics(), "calls") == calls
    split.remote.end_sessions()
    before = split.statistics()
    split.generate(**single_prompt(), **SHARED, do_sample=False)
    ends = 1 if mode == "layer" else 0  # the session's end is one call more
    assert difference(before, split.statistics(), "calls") == 16 * calls + ends


def test_the_tensors_that_cross_are_those_of_the_boundary(
    small: Small, split: SplitLlamaForCausalLM, mode: str
) -> None:
    """Bytes sent and received follow from ``operations`` alone; layer mode adds the positions."""
    geometry, tokens = Geometry.of(small.unsplit.config), 23
    before = split.statistics()
    split(prompt(tokens), logits_to_keep=1)
    after = split.statistics()
    sent = received = 0
    for operation in BY_MODE[Mode(mode)]:
        elements = 1 if operation is LM_HEAD else tokens * geometry.layers
        sent += 4 * elements * operation.input_width(geometry)
        received += 4 * elements * operation.output_width(geometry)
    sent += 8 * tokens if mode == "layer" else 0
    assert difference(before, after, "tensor_bytes_sent") == sent
    assert difference(before, after, "tensor_bytes_received") == received


def test_the_trusted_model_is_a_llama_with_embedding_and_norms_only(
    small: Small, split: SplitLlamaForCausalLM, mode: str
) -> None:
    """Its parameters are V × D of the embedding, D of the final norm, and in fused mode 2 D a layer."""
    config = small.unsplit.config
    assert isinstance(split, LlamaForCausalLM)
    norms = 1 + (2 * config.num_hidden_layers if mode == "fused" else 0)
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


# --- the worker's sessions --------------------------------------------------------------------------------------------


@pytest.fixture
def layer_split(plain: Small, plain_worker: Worker) -> Iterator[SplitLlamaForCausalLM]:
    """The small model in layer mode, on a worker that has no sessions."""
    assert plain_worker.sessions_become(0)
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode="layer") as model:
        yield model


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}])
def test_a_session_is_freed_when_generation_ends(
    plain_worker: Worker, layer_split: SplitLlamaForCausalLM, options: dict[str, Any]
) -> None:
    """Nobody holds the cache any more, so the worker doesn't either."""
    layer_split.generate(**single_prompt(), pad_token_id=0, max_new_tokens=6, do_sample=False, **options)
    assert plain_worker.sessions_become(0)


class Broken(TextStreamer):  # type: ignore[misc]
    """A streamer that fails at the first token."""

    def put(self, value: torch.Tensor) -> None:
        if value.numel() == 1:
            raise OSError("the reader is gone")


def test_a_session_is_freed_when_generation_fails(
    plain: Small, plain_worker: Worker, layer_split: SplitLlamaForCausalLM
) -> None:
    """A generation that raises leaves no KV on the worker once its exception is dealt with, and the next one works."""
    with pytest.raises(OSError, match="the reader is gone"):
        layer_split.generate(**single_prompt(), **SHARED, do_sample=False, streamer=Broken(Spelled()))
    gc.collect()
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, do_sample=False)
    assert torch.equal(layer_split.generate(**single_prompt(), **SHARED, do_sample=False), expected)
    assert plain_worker.sessions_become(0)


def test_a_session_lives_as_long_as_its_cache(plain_worker: Worker, layer_split: SplitLlamaForCausalLM) -> None:
    """A cache that is held keeps its session; when it dies, the next call frees it."""
    kept = layer_split(prompt(), use_cache=True).past_key_values
    other = layer_split(prompt(), use_cache=True).past_key_values
    assert plain_worker.sessions_become(2)
    del other
    layer_split(prompt(1), past_key_values=kept)
    assert plain_worker.sessions_become(1)
    del kept
    layer_split.generate(**single_prompt(), pad_token_id=0, max_new_tokens=1, do_sample=False)
    assert plain_worker.sessions_become(0)


def test_sessions_are_freed_when_the_client_closes(plain: Small, plain_worker: Worker) -> None:
    """A closed connection keeps nothing on the worker, even while its caches are still held here."""
    assert plain_worker.sessions_become(0)
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode="layer") as split:
        caches = [split(prompt(), use_cache=True).past_key_values for _ in range(3)]
        assert plain_worker.sessions_become(3)
    assert plain_worker.sessions_become(0)
    del caches


def test_two_clients_in_turn_get_their_own_tokens(plain: Small, plain_worker: Worker, mode: str) -> None:
    """Forwards of two models on one worker alternate, token by token; each continues its own text."""
    prompts = [prompt(9, seed=40), prompt(14, seed=41)]
    options: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    expected = [plain.unsplit.generate(ids, attention_mask=torch.ones_like(ids), **options) for ids in prompts]
    address = plain_worker.address
    with (
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=address, mode=mode) as first,
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=address, mode=mode) as second,
        torch.inference_mode(),
    ):
        models, texts, caches = (first, second), list(prompts), [first.new_cache(), second.new_cache()]
        for _ in range(12):
            for index, model in enumerate(models):
                new = texts[index][:, caches[index].get_seq_length() :]
                token = model(new, past_key_values=caches[index]).logits[:, -1].argmax(-1, keepdim=True)
                texts[index] = torch.cat([texts[index], token], dim=1)
        for text, right in zip(texts, expected, strict=True):
            assert torch.equal(text, right)


def test_two_clients_at_once_get_their_own_tokens(plain: Small, plain_worker: Worker, mode: str) -> None:
    """Two threads generate on one worker at the same time, one greedily and one with beams."""
    jobs: list[dict[str, Any]] = [{**single_prompt(), **SHARED}, {**padded_prompts(), **SHARED, "num_beams": 2}]
    expected = [plain.unsplit.generate(**job, do_sample=False) for job in jobs]

    def generate(job: dict[str, Any]) -> torch.Tensor:
        with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode=mode) as split:
            tokens: torch.Tensor = split.generate(**job, do_sample=False)
            return tokens

    with ThreadPoolExecutor(2) as threads:
        for tokens, right in zip(threads.map(generate, jobs), expected, strict=True):
            assert torch.equal(tokens, right)


# --- what is refused --------------------------------------------------------------------------------------------------


def mismatch(small: Small, worker: Worker, **options: Any) -> str:
    """The one line that says why this model and worker don't fit."""
    with pytest.raises(WorkerMismatch) as caught:
        SplitLlamaForCausalLM.from_pretrained(small.path, worker=worker.address, **options).close()
    text = str(caught.value)
    assert "\n" not in text
    assert worker.address in text
    return text


def test_a_worker_of_another_geometry_is_refused(plain_worker: Worker, save_small: Callable[..., Small]) -> None:
    """Both geometries are shown."""
    text = mismatch(save_small(num_hidden_layers=2), plain_worker)
    assert "layers=3" in text
    assert "layers=2" in text
    assert "--model" in text


def test_a_worker_of_other_weights_is_refused(plain_worker: Worker, save_small: Callable[..., Small]) -> None:
    """The same shape with other weights would answer nonsense."""
    assert "other weights" in mismatch(save_small(seed=9), plain_worker)


@pytest.mark.parametrize(
    "overrides",
    [
        {"rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"hidden_act": "gelu"},
    ],
    ids=["norm-epsilon", "rope", "activation"],
)
def test_a_worker_of_the_same_weights_under_another_configuration_is_refused(
    plain_worker: Worker, save_small: Callable[..., Small], overrides: dict[str, Any]
) -> None:
    """What isn't in the weights but changes the arithmetic, which in layer mode is the worker's, must agree too."""
    mismatch(save_small(seed=5, **overrides), plain_worker, mode="layer")


def test_a_worker_of_another_dtype_is_refused(plain: Small, plain_worker: Worker) -> None:
    """Both dtypes are shown."""
    text = mismatch(plain, plain_worker, dtype="bfloat16")
    assert "float32" in text
    assert "bfloat16" in text


STATIC = GenerationConfig(cache_implementation="static", max_new_tokens=3, pad_token_id=0)


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        pytest.param((), {"cache_implementation": "static", "max_new_tokens": 3}, id="by-name"),
        pytest.param((), {"generation_config": STATIC}, id="in-a-configuration"),
        pytest.param((STATIC,), {}, id="in-a-positional-configuration"),
    ],
)
def test_a_cache_implementation_is_refused_where_the_worker_keeps_the_kv(
    layer_split: SplitLlamaForCausalLM, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """However transformers lets it be named."""
    with pytest.raises(UnsupportedBySplit, match="static"):
        layer_split.generate(prompt(), *arguments, **keywords)


def test_a_positional_generation_configuration_is_obeyed(plain: Small, plain_worker: Worker) -> None:
    """``generate(ids, configuration)``, as transformers' signature has it, with a cache that it names."""
    expected = plain.unsplit.generate(prompt(), STATIC)
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address) as split:
        assert torch.equal(split.generate(prompt(), STATIC), expected)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_an_output_that_a_split_does_not_have_is_refused(plain_split: SplitLlamaForCausalLM, asked: str) -> None:
    """What is asked for is given or refused, never left out silently."""
    try:
        output = plain_split(prompt(), **{asked: True})
    except UnsupportedBySplit:
        return
    assert output[asked.removeprefix("output_")] is not None


def test_a_tuple_is_returned_if_asked_for(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """``return_dict=False`` gives the logits first in a tuple, as transformers does."""
    with torch.inference_mode():
        expected, output = (model(prompt(), return_dict=False) for model in (plain.unsplit, plain_split))
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], expected[0], atol=1e-4, rtol=1e-4)


def test_a_cache_of_another_kind_is_refused_where_the_worker_keeps_the_kv(layer_split: SplitLlamaForCausalLM) -> None:
    """A dynamic cache here can't be the worker's; the remedy is named."""
    with pytest.raises(UnsupportedBySplit, match="new_cache"):
        layer_split(prompt(), past_key_values=DynamicCache())
    with pytest.raises(UnsupportedBySplit, match="new_cache"):
        layer_split.generate(**single_prompt(), **SHARED, past_key_values=DynamicCache())


def test_a_cache_of_another_models_connection_is_refused(
    plain: Small, plain_worker: Worker, layer_split: SplitLlamaForCausalLM
) -> None:
    """A session belongs to the connection that made it: another's cache would continue another text."""
    with (
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode="layer") as other,
        torch.inference_mode(),
    ):
        mine = layer_split(prompt(seed=1), use_cache=True).past_key_values
        theirs = other(prompt(seed=2), use_cache=True).past_key_values
        with pytest.raises(UnsupportedBySplit):
            layer_split(prompt(1), past_key_values=theirs)
        del mine


def test_a_mask_that_is_not_padding_is_refused_where_the_worker_attends(layer_split: SplitLlamaForCausalLM) -> None:
    """A four-dimensional mask can't cross."""
    with pytest.raises(UnsupportedBySplit, match="mask"):
        layer_split(prompt(4), attention_mask=torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("named", ["static", "dynamic"])
def test_fused_mode_takes_any_cache_of_transformers(plain: Small, plain_worker: Worker, named: str) -> None:
    """Where attention is ours, every cache that generate can make gives the same tokens."""
    expected = plain.unsplit.generate(**padded_prompts(), **SHARED, do_sample=False)
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address) as split:
        tokens = split.generate(**padded_prompts(), **SHARED, do_sample=False, cache_implementation=named)
    assert torch.equal(tokens, expected)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")  # the comparison below says it better
def test_the_models_own_generation_settings_are_in_force(save_small: Callable[..., Small], mode: str) -> None:
    """generation_config.json of the directory counts, as its several end tokens do in instruction-tuned Llamas."""
    small = save_small(seed=11)
    free = small.unsplit.generate(**single_prompt(), **SHARED, do_sample=False)
    settings = GenerationConfig(eos_token_id=[159, int(free[0, 11 + 5])], pad_token_id=0, max_new_tokens=NEW_TOKENS)
    settings.save_pretrained(small.path)
    unsplit = LlamaForCausalLM.from_pretrained(small.path)
    with (
        worker_in_thread(small.path) as worker,
        SplitLlamaForCausalLM.from_pretrained(small.path, worker=worker.address, mode=mode) as split,
    ):
        assert torch.equal(split.generate(**single_prompt()), unsplit.generate(**single_prompt()))
