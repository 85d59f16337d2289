"""Keywords of a forward outside its signature work as in the unsplit model, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs

from llama_split import SplitLlamaForCausalLM, UnsupportedBySplit
from llama_split.trusted.keywords import WITHOUT_EFFECT
from tests.support.llamas import Small
from tests.support.prompts import prompt

IDS = prompt(9, batch=2)
SHIFTED = IDS.roll(-1, dims=1)

LOSSES: dict[str, dict[str, Any]] = {
    "labels": {},
    "num_items_in_batch": {"num_items_in_batch": 5},
    "num_items_in_batch as a tensor": {"num_items_in_batch": torch.tensor(7)},
    "ignore_index": {"ignore_index": int(IDS[0, 4])},
    "shift_labels": {"shift_labels": SHIFTED.flip(0)},
    "all": {"num_items_in_batch": 3, "ignore_index": int(IDS[1, 2]), "shift_labels": SHIFTED},
}


@pytest.mark.parametrize("keywords", LOSSES.values(), ids=LOSSES)
def test_the_loss_is_the_unsplit_models(
    plain: Small, lasting_split: SplitLlamaForCausalLM, keywords: dict[str, Any]
) -> None:
    """Every argument of the loss reaches it."""
    with torch.inference_mode():
        expected = plain.unsplit(IDS, labels=IDS, **keywords).loss
        torch.testing.assert_close(lasting_split(IDS, labels=IDS, **keywords).loss, expected, atol=1e-4, rtol=1e-4)


def test_a_loss_of_ones_own_is_given_its_keywords(plain_split: SplitLlamaForCausalLM) -> None:
    """``loss_function`` may be replaced, as in transformers."""

    def loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, reward: float, **_more: Any) -> torch.Tensor:
        return logits.sum() * 0 + reward + vocab_size

    plain_split.loss_function = loss
    assert float(plain_split(IDS, labels=IDS, reward=0.5).loss) == 160.5


def test_every_keyword_of_transformers_is_known() -> None:
    """A keyword that a new version adds must be examined before it is accepted."""
    here = {"num_items_in_batch", "output_hidden_states", "output_attentions", "position_ids", "is_causal"}
    assert TransformersKwargs.__annotations__.keys() - WITHOUT_EFFECT - here == set()


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_a_keyword_without_effect_is_taken(plain: Small, lasting_split: SplitLlamaForCausalLM, name: str) -> None:
    """The unsplit model gives the same with it as without it, and so does a split."""
    value = torch.zeros_like(IDS)
    with torch.inference_mode():
        expected = plain.unsplit(IDS).logits
        assert torch.equal(plain.unsplit(IDS, **{name: value}).logits, expected)
        torch.testing.assert_close(lasting_split(IDS, **{name: value}).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_causal", False),
        ("scaling", 0.5),
        ("softcap", 3.0),
        ("sliding_window", 4),
        ("position_bias", torch.zeros(1)),
        ("head_mask", torch.zeros(3, 4)),
        ("kv_cache", object()),
        ("cache_params", object()),
        ("block_table", torch.zeros(1)),
    ],
)
def test_any_other_keyword_is_refused_by_its_name(lasting_split: SplitLlamaForCausalLM, name: str, value: Any) -> None:
    """The unsplit model's attention might read it; None counts as absent, and generation passes it on."""
    with pytest.raises(UnsupportedBySplit, match=f"forward takes no {name} "):
        lasting_split(IDS, **{name: value})
    lasting_split(IDS, **{name: None})


def test_causal_attention_may_be_asked_for(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """The split model's attention is always causal."""
    with torch.inference_mode():
        expected = plain.unsplit(IDS, is_causal=True).logits
        torch.testing.assert_close(lasting_split(IDS, is_causal=True).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_tuple_is_given_where_no_dictionary_is_wanted(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """``return_dict=False``, in the call."""
    with torch.inference_mode():
        expected, found = (model(IDS, return_dict=False) for model in (plain.unsplit, lasting_split))
    assert isinstance(found, tuple)
    assert len(found) == len(expected)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)


KEPT: dict[str, Any] = {
    "last": 2,
    "none named": 0,
    "more than there are": 99,
    "negative": -3,
    "indices": torch.tensor([0, 3, 8]),
    "of each row": torch.tensor([[1, 2], [0, 8]]),
    "mask": torch.arange(18).view(2, 9) % 5 == 0,
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_logits_are_kept_as_by_the_unsplit_model(plain: Small, lasting_split: SplitLlamaForCausalLM, kept: Any) -> None:
    """``logits_to_keep`` in each of its forms, whatever shape this version of transformers makes of it."""

    def logits(model: PreTrainedModel) -> torch.Tensor:
        found: torch.Tensor = model(IDS, logits_to_keep=kept).logits
        return found

    with torch.inference_mode():
        try:
            expected = logits(plain.unsplit)
        except Exception as error:  # noqa: BLE001 - whatever it is
            with pytest.raises(type(error)):
                logits(lasting_split)
            return
        torch.testing.assert_close(logits(lasting_split), expected, atol=1e-4, rtol=1e-4)


def test_a_cache_that_is_none_of_transformers_is_refused(lasting_split: SplitLlamaForCausalLM) -> None:
    """Tuples of tensors, which old versions took, and caches of other engines."""
    for cache in (((torch.zeros(1),),), object()):
        with pytest.raises(UnsupportedBySplit, match="past_key_values is a"):
            lasting_split(IDS, past_key_values=cache)
