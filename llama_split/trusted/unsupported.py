"""What a transformers model can do and a split model can't: each method is refused by name, with the reason.

Methods that are not named here work as on the unsplit model; a test goes through all methods of a Llama.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..errors import UnsupportedBySplit

_PARTIAL = "this side holds only a few of the model's weights, the worker the others: use the model's own files"
_ALIKE = "the worker's weights would stay as they are"
_TRAINING = "a split model can't be trained: no gradient crosses to the worker"
_ADAPTERS = "an adapter changes matrices that the worker holds: merge it into the model's files, for both sides"
_ELSEWHERE = "the model is already split between this process and its worker"
_COUNTS = "this side holds only a part of the model: `llama-split info` shows what each side holds"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("save_pretrained", "push_to_hub", "state_dict"), _PARTIAL),
    **dict.fromkeys(("save_distributed_checkpoint", "gather_sharded_state_dict_for_save"), _PARTIAL),
    **dict.fromkeys(("load_state_dict", "resize_token_embeddings", "tie_weights", "to_empty"), _ALIKE),
    **dict.fromkeys(("set_input_embeddings", "set_output_embeddings", "set_decoder", "set_encoder"), _ALIKE),
    **dict.fromkeys(("init_weights", "initialize_weights", "post_init"), _ALIKE),
    **dict.fromkeys(("num_parameters", "get_memory_footprint"), _COUNTS),
    **dict.fromkeys(("gradient_checkpointing_enable", "activation_checkpointing_enable"), _TRAINING),
    "enable_input_require_grads": _TRAINING,
    **dict.fromkeys(("add_adapter", "load_adapter", "set_adapter", "delete_adapter", "active_adapters"), _ADAPTERS),
    **dict.fromkeys(("enable_adapters", "disable_adapters", "get_adapter_state_dict"), _ADAPTERS),
    "enable_peft_hotswap": _ADAPTERS,
    **dict.fromkeys(("prepare_distribute_model", "maybe_distribute_model"), _ELSEWHERE),
    "set_use_kernels": "this side does not hold all layers that kernels would replace",
}

ATTENTIONS = ("eager", "sdpa", "paged|eager")
"""Implementations of attention with the same results as the splits' own; no other can be chosen."""

Class = TypeVar("Class", bound=type)


def refusing(model_class: Class) -> Class:
    """Make all methods in ``REFUSED`` of a class of models raise ``UnsupportedBySplit``."""
    for name, reason in REFUSED.items():
        setattr(model_class, name, _refusal(name, reason))
    return model_class


def _refusal(name: str, reason: str) -> Callable[..., Any]:
    def refuse(*_arguments: Any, **_kwargs: Any) -> Any:
        raise UnsupportedBySplit(f"{name}: {reason}")

    refuse.__name__ = name
    refuse.__doc__ = f"Raise ``UnsupportedBySplit``: {reason}."
    return refuse


class SameWeights:
    """A module whose weights keep their dtype and device: to(), half(), cuda() and so on would change one side only."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """The method behind all of these in torch; tries ``fn`` on an empty tensor first.

        Raises:
            UnsupportedBySplit: ``fn`` changes the dtype or the device.
        """
        module: Any = self
        weight = next(module.parameters())
        probe = torch.empty(0, dtype=weight.dtype, device=weight.device)
        changed = fn(probe)
        if changed.dtype != probe.dtype:
            raise UnsupportedBySplit(
                f"to {changed.dtype}: only this side's weights would change, the worker's stay {probe.dtype}: pass "
                "dtype= to from_pretrained, and start the worker with the same"
            )
        if changed.device != probe.device:
            raise UnsupportedBySplit(
                f"to {changed.device}: this side's weights stay in ordinary memory, where the arenas are; the worker's "
                "device is chosen where it is started"
            )
        parent: Any = super()
        return parent._apply(fn, recurse)  # noqa: SLF001 - torch's own name for what subclasses override


def check_attention(implementation: str | dict[str, Any]) -> None:
    """Refuse an implementation of attention with other results than a split's own.

    Raises:
        UnsupportedBySplit: it is none of ``ATTENTIONS``.
    """
    named = list(implementation.values()) if isinstance(implementation, dict) else [implementation]
    for name in named:
        if name not in ATTENTIONS:
            raise UnsupportedBySplit(
                f"set_attn_implementation({name!r}): a split has its own attention; choose {' or '.join(ATTENTIONS)}"
            )


def refuse_gradients(model: torch.nn.Module, source: torch.Tensor) -> None:
    """Refuse a forward in training mode, or one whose input or parameters require gradients.

    Raises:
        UnsupportedBySplit: no gradient crosses to the worker.
    """
    if model.training:
        raise UnsupportedBySplit("a split model can't be trained: no gradient crosses to the worker; call eval()")
    if torch.is_grad_enabled() and (source.requires_grad or any(p.requires_grad for p in model.parameters())):
        raise UnsupportedBySplit(
            "a gradient is asked for, and none crosses to the worker: use torch.no_grad(), or inputs and "
            "parameters without requires_grad"
        )
