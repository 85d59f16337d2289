"""What the command line takes from a model's ``generation_config.json``, and what it decides itself.

End tokens, stop strings and constraints on the next token count as in transformers. How tokens are searched for, and
what ``generate`` returns, is the command's decision: greedy search, or sampling where its options ask for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

_TAKEN_OVER = (
    *("eos_token_id", "stop_strings", "max_time", "min_length", "min_new_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("sequence_bias", "exponential_decay_length_penalty", "guidance_scale", "watermarking_config"),
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("renormalize_logits", "remove_invalid_values"),
)
_WITHOUT_NOTICE = {
    *("do_sample", "max_length", "max_new_tokens", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
    *("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("compile_config", "disable_compile", "continuous_batching_config"),
}
"""Settings that have an option of their own here, or that change no token of one answer to one prompt."""


def taken_over(found: GenerationConfig) -> GenerationConfig:
    """The part of a model's settings that counts here."""
    from transformers import GenerationConfig

    return GenerationConfig(**{name: getattr(found, name, None) for name in _TAKEN_OVER})


def overruled(found: GenerationConfig) -> list[str]:
    """The names of the settings that would change an answer but don't count here."""
    from transformers import GenerationConfig

    plain = GenerationConfig()
    defaults = {**vars(plain), **plain._get_default_generation_params()}  # noqa: SLF001 - transformers has no public list
    names = (name for name in defaults if not name.startswith("_") and name != "transformers_version")
    others = (name for name in names if name not in _TAKEN_OVER and name not in _WITHOUT_NOTICE)
    return [name for name in others if getattr(found, name, None) not in (None, defaults[name])]


def decoding(model: GenerationConfig, limit: int, choice: dict[str, Any]) -> GenerationConfig:
    """The settings of one answer.

    Args:
        model: the model's settings, as ``taken_over`` returns them.
        limit: the most new tokens.
        choice: the command's settings, which override the model's.
    """
    from transformers import GenerationConfig

    settings = {name: getattr(model, name) for name in _TAKEN_OVER} | choice
    return GenerationConfig(**settings, max_new_tokens=limit, num_beams=1, pad_token_id=0)
