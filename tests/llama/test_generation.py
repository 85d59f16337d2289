"""Small random models: ``generate`` gives the same results split and unsplit."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from llama_split import SplitLlamaForCausalLM
from llama_split.checkpoint.synthetic import RandomCheckpoint
from llama_split.trusted.transformers_versions import CACHE_NAME, CACHE_NAMES
from tests.support.llamas import Small, worker_in_thread
from tests.support.prompts import (
    LONG,
    NEW_TOKENS,
    SHARED,
    SHARED_TOKENS,
    STATIC,
    Spelled,
    difference,
    padded_prompts,
    prompt,
    single_prompt,
)


@functools.cache
def greedy(small: Small, prompts: Callable[[], dict[str, torch.Tensor]], count: int = NEW_TOKENS) -> torch.Tensor:
    """What the unsplit model writes, once for all splits."""
    tokens: torch.Tensor = small.unsplit.generate(**prompts(), max_new_tokens=count, pad_token_id=0, do_sample=False)
    return tokens


@pytest.mark.parametrize("prompts", [single_prompt, padded_prompts])
def test_greedy_tokens_are_those_of_the_unsplit_model(
    small: Small, split: SplitLlamaForCausalLM, prompts: Callable[[], dict[str, torch.Tensor]]
) -> None:
    """For each kind of model, split and batch, every token of 24 is the same, padding on the left or not."""
    expected = greedy(small, prompts)
    tokens = split.generate(**prompts(), **LONG, do_sample=False)
    assert torch.equal(tokens, expected)
    assert len(set(expected[0, -NEW_TOKENS:].tolist())) > 3, "the random model repeats itself; nothing was tested"


SAMPLING: dict[str, dict[str, Any]] = {
    "top-k-top-p": {"temperature": 0.8, "top_k": 20, "top_p": 0.95},
    "min-p": {"temperature": 1.5, "min_p": 0.05},
    "repetition": {"temperature": 0.9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_sampled_tokens_are_those_of_the_unsplit_model(
    plain: Small, lasting_split: SplitLlamaForCausalLM, options: dict[str, Any]
) -> None:
    """With the same seed, sampling takes the same tokens, whatever narrows the choice."""
    options = {"do_sample": True, **options}
    torch.manual_seed(7)
    expected = plain.unsplit.generate(**padded_prompts(), **SHARED, **options)
    torch.manual_seed(7)
    assert torch.equal(lasting_split.generate(**padded_prompts(), **SHARED, **options), expected)


def test_beam_search_finds_the_unsplit_models_sequences(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """Beams reorder the cache after every token, on whichever side it is."""
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    expected = plain.unsplit.generate(**padded_prompts(), **SHARED, **options)
    assert torch.equal(lasting_split.generate(**padded_prompts(), **SHARED, **options), expected)


def test_several_sequences_of_a_prompt_are_the_unsplit_models(
    plain: Small, lasting_split: SplitLlamaForCausalLM
) -> None:
    """``num_return_sequences`` samples a prompt several times."""
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(3)
    expected = plain.unsplit.generate(**padded_prompts(), **SHARED, **options)
    torch.manual_seed(3)
    assert torch.equal(lasting_split.generate(**padded_prompts(), **SHARED, **options), expected)


def test_prompt_lookup_gives_the_greedy_tokens(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """Guessed tokens are checked several at a time, and wrong ones cropped from the cache: the tokens stay the same."""
    ids = prompt(6).repeat(1, 4)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    expected = plain.unsplit.generate(ids, **options, **SHARED)
    assert torch.equal(lasting_split.generate(ids, **options, **SHARED, prompt_lookup_num_tokens=3), expected)


def test_an_assistant_model_gives_the_greedy_tokens(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """A smaller local model may guess for the split one."""
    expected = greedy(plain, single_prompt, SHARED_TOKENS)
    assert torch.equal(
        lasting_split.generate(**single_prompt(), **SHARED, do_sample=False, assistant_model=plain.unsplit), expected
    )


def test_generation_without_a_cache_gives_the_greedy_tokens(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """``use_cache=False`` recomputes everything for each token."""
    options: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    expected = plain.unsplit.generate(**padded_prompts(), **options)
    assert torch.equal(lasting_split.generate(**padded_prompts(), **options, use_cache=False), expected)


def test_chunked_prefill_gives_the_greedy_tokens(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """A prompt may be processed in chunks."""
    expected = greedy(plain, single_prompt, SHARED_TOKENS)
    tokens = lasting_split.generate(**single_prompt(), **SHARED, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(tokens, expected)


def test_generation_stops_where_the_unsplit_model_does(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """An end-of-text token ends a row, and the other rows go on with padding for it."""
    free = greedy(plain, padded_prompts, SHARED_TOKENS)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": int(free[1, 12 + 6])}
    expected = plain.unsplit.generate(**padded_prompts(), **SHARED, **options)
    assert torch.equal(lasting_split.generate(**padded_prompts(), **SHARED, **options), expected)
    assert not torch.equal(expected, free)


class AfterTokens(StoppingCriteria):  # type: ignore[misc]
    """Stops at a given length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_a_stopping_criterion_of_ones_own_is_asked(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """``stopping_criteria`` end generation at the same token."""
    options: dict[str, Any] = {"do_sample": False, "stopping_criteria": StoppingCriteriaList([AfterTokens(20)])}
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, **options)
    tokens = lasting_split.generate(**single_prompt(), **SHARED, **options)
    assert torch.equal(tokens, expected)
    assert tokens.shape[1] == 20


def test_a_stop_string_ends_the_text(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """``stop_strings`` end generation where the unsplit model's ends, in the middle of the text."""
    tokenizer = RandomCheckpoint("llama-3.2-1b", vocab_size=300).tokenizer()
    free = greedy(plain, single_prompt, SHARED_TOKENS)
    options: dict[str, Any] = {"do_sample": False, "tokenizer": tokenizer}
    options["stop_strings"] = [tokenizer.decode(free[0, 11 + 5 : 11 + 7])]
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, **options)
    assert expected.shape[1] < free.shape[1]
    assert torch.equal(lasting_split.generate(**single_prompt(), **SHARED, **options), expected)


def test_a_text_streamer_prints_the_tokens(
    plain: Small, lasting_split: SplitLlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    """The streamer gets the unsplit model's tokens, in order."""
    expected = greedy(plain, single_prompt, SHARED_TOKENS)
    lasting_split.generate(
        **single_prompt(), **SHARED, do_sample=False, streamer=TextStreamer(Spelled(), skip_prompt=True)
    )
    assert capsys.readouterr().out.split() == [str(token) for token in expected[0, 11:].tolist()]


def test_an_iterator_streamer_is_fed_from_another_thread(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """Generation may run in a thread while another one reads the text."""
    expected = greedy(plain, single_prompt, SHARED_TOKENS)
    streamer = TextIteratorStreamer(Spelled(), skip_prompt=True, timeout=30.0)
    options = {**single_prompt(), **SHARED, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=lasting_split.generate, kwargs=options)
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
                **{CACHE_NAME: cache},
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


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")  # the comparison below gives a better message
def test_the_models_own_generation_settings_are_in_force(save_small: Callable[..., Small], mode: str) -> None:
    """generation_config.json in the directory counts; instruction-tuned Llamas name several end tokens there."""
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


def test_a_positional_generation_configuration_is_obeyed(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """``generate(ids, configuration)``, as transformers' signature has it, with a cache that it names."""
    expected = plain.unsplit.generate(prompt(), STATIC)
    assert torch.equal(lasting_split.generate(prompt(), STATIC), expected)
    assert STATIC.cache_implementation == "static", "the caller's configuration was changed"


WAYS: tuple[dict[str, Any], ...] = ({}, {"num_beams": 2}, {"prefill_chunk_size": 5})


@pytest.fixture(scope="module", params=["static", "dynamic", "sliding_window"])
def naming(request: pytest.FixtureRequest, save_small: Callable[..., Small]) -> Small:
    """A small model whose generation_config.json names one of transformers' caches."""
    path = save_small(seed=11).path
    GenerationConfig(cache_implementation=request.param, pad_token_id=0, max_new_tokens=6).save_pretrained(path)
    return Small(path, LlamaForCausalLM.from_pretrained(path))


@pytest.fixture(scope="module")
def texts_of_naming(naming: Small) -> list[torch.Tensor]:
    """What it writes unsplit, in each way."""
    return [naming.unsplit.generate(**padded_prompts(), **how) for how in WAYS]


def test_a_cache_named_by_the_model_directory_does_no_harm(
    naming: Small, texts_of_naming: list[torch.Tensor], mode: str
) -> None:
    """generation_config.json may name one of transformers' caches: each split writes what the unsplit model does."""
    with (
        worker_in_thread(naming.path) as worker,
        SplitLlamaForCausalLM.from_pretrained(naming.path, worker=worker.address, mode=mode) as split,
    ):
        for how, expected in zip(WAYS, texts_of_naming, strict=True):
            assert torch.equal(split.generate(**padded_prompts(), **how), expected)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_taken_by_each_of_its_names(plain: Small, lasting_split: SplitLlamaForCausalLM, name: str) -> None:
    """The argument was renamed in transformers: by either name the cache is filled, returned and gone on with."""
    expected = greedy(plain, single_prompt, SHARED_TOKENS)
    cache = lasting_split.new_cache()
    tokens = lasting_split.generate(**single_prompt(), **SHARED, do_sample=False, **{name: cache})
    assert torch.equal(tokens, expected)
    assert cache.get_seq_length() == tokens.shape[1] - 1
    output = lasting_split(tokens[:, -1:], **{name: cache})
    assert output[CACHE_NAME] is output.past_key_values is cache
    assert cache.get_seq_length() == tokens.shape[1]


def test_two_caches_by_two_names_are_refused(lasting_split: SplitLlamaForCausalLM) -> None:
    """The split model doesn't silently use one and ignore the other."""
    caches = {name: lasting_split.new_cache() for name in CACHE_NAMES}
    with pytest.raises(ValueError, match="two different ones"):
        lasting_split(prompt(), **caches)
    with pytest.raises(ValueError, match="two different ones"):
        lasting_split.generate(**single_prompt(), **SHARED, **caches)
