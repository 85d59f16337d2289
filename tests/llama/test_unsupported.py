"""Every public method of transformers' Llama works on a split model as on an unsplit one, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from llama_split import SplitLlamaForCausalLM, UnsupportedBySplit
from llama_split.boundary.operations import Mode
from llama_split.trusted.unsupported import REFUSED
from tests.support.llamas import Small
from tests.support.prompts import SHARED, prompt, single_prompt

# Neither refused nor changed: they describe the class, its modules and flags, or have a test here or elsewhere.
SAME = """
T_destination add_model_tags add_module adjust_generation_fn apply base_model base_model_prefix buffers call_super_init
can_generate can_record_outputs children compute_transition_scores config_class device dtype dummy_inputs dump_patches
eval extra_repr generation_config_class get_buffer get_compiled_call get_correct_attn_implementation
get_correct_experts_implementation get_decoder get_encoder get_expanded_tied_weights_keys get_experts_implementation
get_extra_state get_init_context get_input_embeddings get_output_embeddings get_parameter get_parameter_or_buffer
get_position_embeddings get_submodule heal_tokens input_modalities is_backend_compatible is_custom_code is_remote_code
load_custom_generate loss_function main_input_name mark_tied_weights_as_initialized model_tags modules named_buffers
named_children named_modules named_non_persistent_buffers named_parameters output_modalities parameters
prepare_inputs_for_generation register_backward_hook register_buffer register_for_auto_class register_forward_hook
register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook
register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module register_parameter
register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ resize_position_embeddings
retrieve_modules_from_names set_experts_implementation set_extra_state set_submodule share_memory smart_apply train
use_kernels warn_if_padding_and_no_attention_mask zero_grad compile dequantize disable_input_require_grads
activation_checkpointing_disable gradient_checkpointing_disable is_activation_checkpointing is_gradient_checkpointing
supports_gradient_checkpointing supports_context_parallel supports_pp_plan supports_tp_plan fsdp_size tp_size
barrier_after_gathered_checkpoint_save ep_plan fsdp_plan init_parallel_plans is_distributed_loading_by_transformers
pp_plan should_save_on_this_rank tp_plan destroy_cached_continuous_batching_manager
continuous_batching_context_manager generate_batch
""".split()  # noqa: SIM905 - a line each would hide the rest
OWN = ["forward", "from_pretrained", "generate", "init_continuous_batching", "set_attn_implementation"]
BY_APPLY = ["to", "cpu", "cuda", "ipu", "mtia", "xpu", "type", "half", "bfloat16", "float", "double"]


def test_every_method_of_a_llama_is_known() -> None:
    """A method that a new version adds must be examined before it is allowed: does it need weights of the worker?"""
    names = {name for name in dir(LlamaForCausalLM) if not name.startswith("_") and name not in dir(object)}
    assert names - {*SAME, *OWN, *BY_APPLY, *REFUSED} == set()
    assert not {*SAME, *OWN, *BY_APPLY} & REFUSED.keys()


@dataclass(frozen=True)
class Lasting:
    """A split model that all methods are refused by, one after another, and what it gave before the first."""

    split: SplitLlamaForCausalLM
    logits: torch.Tensor


@pytest.fixture(scope="module")
def lasting(lasting_split: SplitLlamaForCausalLM) -> Lasting:
    """One in each split."""
    return Lasting(lasting_split, lasting_split(prompt()).logits.clone())


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_needs_what_is_not_here_is_refused_by_its_name(
    lasting: Lasting, name: str, tmp_path: Path
) -> None:
    """With any arguments; nothing is written, and the model works as before."""
    with pytest.raises(UnsupportedBySplit, match=f"^{name}: "):
        getattr(lasting.split, name)(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(lasting.split(prompt()).logits, lasting.logits)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to dtype": lambda model: model.to(torch.float16),
    "to dtype by keyword": lambda model: model.to(dtype=torch.bfloat16),
    "to meta": lambda model: model.to("meta"),
    "type": lambda model: model.type(torch.float64),
    "half of its part": lambda model: model.model.half(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_this_sides_weights_alone_is_refused(
    lasting_split: SplitLlamaForCausalLM, change: Callable[[Any], Any]
) -> None:
    """The worker's weights would stay as they are; no weight has changed after the refusal."""
    before = lasting_split(prompt()).logits
    with pytest.raises(UnsupportedBySplit, match="this side's weights"):
        change(lasting_split)
    assert {parameter.dtype for parameter in lasting_split.parameters()} == {torch.float32}
    assert torch.equal(lasting_split(prompt()).logits, before)


def test_a_change_to_what_the_weights_are_already_does_nothing(lasting_split: SplitLlamaForCausalLM) -> None:
    """Pipelines do this for every model."""
    before = lasting_split(prompt()).logits
    assert lasting_split.to("cpu").float().cpu().to(torch.float32) is lasting_split
    assert torch.equal(lasting_split(prompt()).logits, before)


def test_embedding_and_head_can_be_asked(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """On either side; ids may be of 32 bits, and the caller owns the result."""
    with torch.inference_mode():
        for ids in (prompt(7, batch=2), prompt(7, batch=2).int()):
            expected = plain.unsplit.get_input_embeddings()(ids)
            embedded = lasting_split.get_input_embeddings()(ids)
            torch.testing.assert_close(embedded, expected)
            torch.testing.assert_close(lasting_split(ids).logits, plain.unsplit(ids).logits, atol=1e-4, rtol=1e-4)
        for hidden in (expected, expected[:, -1], expected[0, 0]):
            found = lasting_split.get_output_embeddings()(hidden)
            torch.testing.assert_close(found, plain.unsplit.lm_head(hidden), atol=1e-4, rtol=1e-4)


def test_weights_that_are_the_workers_are_refused_by_their_name(lasting_split: SplitLlamaForCausalLM) -> None:
    """The caller gets neither None nor an AttributeError, but an error that names the weight."""
    with pytest.raises(UnsupportedBySplit, match=r"RemoteHead.weight"):
        _ = lasting_split.get_output_embeddings().weight
    if lasting_split.mode is Mode.OP:
        with pytest.raises(UnsupportedBySplit, match=r"RemoteEmbedding.weight"):
            _ = lasting_split.get_input_embeddings().weight


def test_the_inner_model_is_refused(lasting_split: SplitLlamaForCausalLM) -> None:
    """The errors for ``model.model`` and ``get_decoder()`` name what to call instead."""
    for part in (lasting_split.model, lasting_split.get_decoder(), lasting_split.base_model):
        with pytest.raises(UnsupportedBySplit, match="call the model itself"):
            part(prompt())


def test_other_attention_is_refused_and_its_own_is_taken(plain_split: SplitLlamaForCausalLM) -> None:
    """Flash and flexible attention would be accepted but never used."""
    before = plain_split(prompt()).logits
    for name in ("flash_attention_2", "flex_attention", "paged|sdpa", {"": "flash_attention_3"}):
        with pytest.raises(UnsupportedBySplit, match="set_attn_implementation"):
            plain_split.set_attn_implementation(name)
    plain_split.set_attn_implementation("eager")
    torch.testing.assert_close(plain_split(prompt()).logits, before, atol=1e-4, rtol=1e-4)


def test_an_early_exit_is_refused_and_leaves_the_model_whole(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """The early exit would change the configuration's number of layers."""
    with pytest.raises(UnsupportedBySplit, match="assistant_early_exit"):
        plain_split.generate(**single_prompt(), **SHARED, assistant_early_exit=1)
    assert plain_split.config.num_hidden_layers == plain.unsplit.config.num_hidden_layers
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, do_sample=False)
    assert torch.equal(plain_split.generate(**single_prompt(), **SHARED, do_sample=False), expected)


def test_a_configuration_that_its_owner_changes_leaves_the_model_as_it_is(
    plain: Small, plain_split: SplitLlamaForCausalLM
) -> None:
    """The geometry is fixed when the weights are loaded."""
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, do_sample=False)
    changed: dict[str, Any] = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 7,
        "intermediate_size": 5,
        "rms_norm_eps": 0.5,
        "max_position_embeddings": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3.0},
        "_attn_implementation_internal": "eager",
    }
    for name, value in changed.items():
        setattr(plain_split.config, name, value)
    assert torch.equal(plain_split.generate(**single_prompt(), **SHARED, do_sample=False), expected)
    labels = plain_split(prompt(), labels=prompt()).loss
    torch.testing.assert_close(labels, plain.unsplit(prompt(), labels=prompt()).loss)


def test_scores_of_a_generation_are_the_unsplit_models(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """``compute_transition_scores`` over what ``generate`` returns."""

    def scores(model: LlamaForCausalLM) -> torch.Tensor:
        options = {**SHARED, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        output = model.generate(**single_prompt(), **options)
        found: torch.Tensor = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
        return found

    torch.testing.assert_close(scores(lasting_split), scores(plain.unsplit), atol=1e-4, rtol=1e-4)


def test_a_generation_from_embeddings_goes_on_from_its_cache(
    plain: Small, lasting_split: SplitLlamaForCausalLM
) -> None:
    """Three tokens from ``inputs_embeds``, then one more over the returned cache, are four tokens at once."""
    shared: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    embed = lasting_split.get_input_embeddings()
    with torch.inference_mode():
        embedded = embed(prompt())
        expected = plain.unsplit.generate(inputs_embeds=embedded, max_new_tokens=4, **shared)
        first = lasting_split.generate(
            inputs_embeds=embedded, max_new_tokens=3, return_dict_in_generate=True, output_scores=True, **shared
        )
        longer = torch.cat([embedded, embed(first.sequences)], dim=1)
        rest = lasting_split.generate(
            first.sequences,
            inputs_embeds=longer,
            attention_mask=torch.ones(longer.shape[:2], dtype=torch.int64),
            max_new_tokens=1,
            past_key_values=first.past_key_values,
            **shared,
        )
    assert torch.equal(rest, expected)


def test_what_describes_a_model_tells_the_same(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """Its device, dtype and capabilities."""
    for name in ("device", "dtype", "use_kernels", "main_input_name", "base_model_prefix"):
        assert getattr(lasting_split, name) == getattr(plain.unsplit, name)
    assert lasting_split.can_generate()
