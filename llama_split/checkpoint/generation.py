"""Reads the generation settings that come with a model, and checks that ``generate`` can use their values.

transformers reads the file without checking the types of the values, and fails later, where they are used.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..errors import CheckpointError
from .files import one_line, read_object

_LIMIT = 1 << 31
_ABOVE_ZERO = math.ulp(0.0)

_Test = Callable[[Any], bool]


def _whole(value: Any, low: int = -_LIMIT, high: int = _LIMIT - 1) -> bool:
    return type(value) is int and low <= value <= high


def _number(low: float, high: float = _LIMIT) -> _Test:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _list_of(test: _Test) -> _Test:
    return lambda value: isinstance(value, (list, tuple)) and all(map(test, value))


def _any_of(*tests: _Test) -> _Test:
    return lambda value: any(test(value) for test in tests)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _count(low: int) -> _Test:
    return lambda value: _whole(value, low)


def _decay(value: Any) -> bool:
    return _list_of(_number(-_LIMIT))(value) and len(value) == 2


def _penalty(value: Any) -> bool:
    return value == 1 or (isinstance(value, float) and _number(_ABOVE_ZERO)(value))


def _ids(low: int, high: int) -> _Test:
    """One token id or several."""

    def one(value: Any) -> bool:
        return _whole(value, low, high)

    return lambda value: one(value) or (_list_of(one)(value) and len(value) > 0)


_RULES: dict[str, tuple[Iterable[str], _Test]] = {
    "true or false": (
        (
            *("do_sample", "use_cache", "use_mtp", "renormalize_logits", "remove_invalid_values", "token_healing"),
            *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
            *("return_dict_in_generate", "disable_compile", "is_assistant"),
        ),
        _flag,
    ),
    "a whole number of 0 or more": (
        (
            *("max_length", "min_length", "min_new_tokens", "top_k"),
            *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        ),
        _count(0),
    ),
    "a whole number of 1 or more": (
        (
            *("max_new_tokens", "num_beams", "num_beam_groups", "num_return_sequences", "max_cache_len"),
            *("num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit"),
            *("assistant_lookbehind", "target_lookbehind", "prefill_chunk_size"),
        ),
        _count(1),
    ),
    "a number from 0 to 1": (
        (
            *("top_p", "min_p", "epsilon_cutoff", "eta_cutoff"),
            "assistant_confidence_threshold",
        ),
        _number(0.0, 1.0),
    ),
    "a number above 0, at most 1": (("top_h", "typical_p"), _number(_ABOVE_ZERO, 1.0)),
    "a number of 0 or more": (("temperature", "max_time", "penalty_alpha"), _number(0.0)),
    "a number above 0 with a decimal point": (("repetition_penalty", "encoder_repetition_penalty"), _penalty),
    "a number": (("length_penalty", "diversity_penalty", "guidance_scale"), _number(-_LIMIT)),
    "a token id or a list of them": (
        ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "suppress_tokens"),
        _ids(-_LIMIT, _LIMIT - 1),
    ),
    "a list of token ids": (("begin_suppress_tokens",), _list_of(_whole)),
    "a text or a list of them": (("stop_strings",), _any_of(_text, _list_of(_text))),
    "a text": (("cache_implementation", "num_assistant_tokens_schedule"), _text),
    "an object": (("cache_config",), lambda value: isinstance(value, dict)),
    "two numbers": (("exponential_decay_length_penalty",), _decay),
}


def read_generation_config(path: Path) -> GenerationConfig:
    """Read a generation config file.

    Raises:
        CheckpointError: it can't be read.
    """
    read_object(path)
    try:
        return GenerationConfig.from_pretrained(path.parent, path.name)
    except Exception as error:  # a wrong file may raise anything in transformers
        raise CheckpointError(f"{path} can't be used: {one_line(error)}") from error


def check_generation_config(path: Path, config: GenerationConfig, vocabulary: int) -> GenerationConfig:
    """Return the settings unchanged, if ``generate`` can use all of them.

    Args:
        path: where they are from, for the error.
        config: the settings.
        vocabulary: the model's number of tokens.

    Raises:
        CheckpointError: a setting has a type or a range that ``generate`` can't use.
    """
    inside = _ids(0, vocabulary - 1)
    words = _list_of(lambda word: isinstance(word, list) and inside(word))
    biased = _list_of(
        lambda pair: isinstance(pair, list) and len(pair) == 2 and words(pair[:1]) and type(pair[1]) is float
    )
    rules = {
        **_RULES,
        f"a token id from 0 to {vocabulary - 1}, or a list of them": (
            ("forced_bos_token_id", "forced_eos_token_id"),
            inside,
        ),
        "a list of lists of token ids": (("bad_words_ids",), lambda value: bool(value) and words(value)),
        "a list of pairs of token ids and a bias": (
            ("sequence_bias",),
            lambda value: bool(value) and biased(value),
        ),
    }
    for wanted, (names, test) in rules.items():
        for name in names:
            value = getattr(config, name, None)
            if value is not None and not test(value):
                raise CheckpointError(f"{path} has {reprlib.repr(value)} as {name} for generation; it must be {wanted}")
    return config
