"""A Llama split between a trusted process and a worker, with tensors that cross through shared memory.

Names are imported on first use: importing torch and transformers takes seconds, and the command line must set thread
policies before that. Names that need them raise ``LlamaSplitError`` if an installed version is not a tested one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import missing_package

if TYPE_CHECKING:
    from .boundary.operations import Mode
    from .errors import (
        CheckpointError,
        LlamaSplitError,
        MasksExhausted,
        MissingPackage,
        UnsupportedBySplit,
        WorkerFailed,
        WorkerMismatch,
        WorkerTampered,
    )
    from .trusted.model import SplitLlamaForCausalLM

_HOMES = {
    "CheckpointError": "errors",
    "LlamaSplitError": "errors",
    "MasksExhausted": "errors",
    "MissingPackage": "errors",
    "Mode": "boundary.operations",
    "SplitLlamaForCausalLM": "trusted.model",
    "UnsupportedBySplit": "errors",
    "WorkerFailed": "errors",
    "WorkerMismatch": "errors",
    "WorkerTampered": "errors",
}

__all__ = [
    "CheckpointError",
    "LlamaSplitError",
    "MasksExhausted",
    "MissingPackage",
    "Mode",
    "SplitLlamaForCausalLM",
    "UnsupportedBySplit",
    "WorkerFailed",
    "WorkerMismatch",
    "WorkerTampered",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            if _HOMES[name] != "errors":
                import_module(".boundary.requirements", __name__).check_requirements()
            return getattr(import_module(f".{_HOMES[name]}", __name__), name)
        except ModuleNotFoundError as error:
            raise missing_package(error) or error from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
