"""A Llama split between a trusted process and a worker, with tensors that travel through shared memory.

Names are imported when they are first used: importing torch and transformers takes seconds, and the command line must
set thread policies before. Those that need transformers raise ``LlamaSplitError`` where its version was not tested.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import missing_package

if TYPE_CHECKING:
    from .errors import (
        CheckpointError,
        LlamaSplitError,
        MissingPackage,
        UnsupportedBySplit,
        WorkerFailed,
        WorkerMismatch,
    )
    from .operations import Mode
    from .trusted.model import SplitLlamaForCausalLM

_HOMES = {
    "CheckpointError": "errors",
    "LlamaSplitError": "errors",
    "MissingPackage": "errors",
    "Mode": "operations",
    "SplitLlamaForCausalLM": "trusted.model",
    "UnsupportedBySplit": "errors",
    "WorkerFailed": "errors",
    "WorkerMismatch": "errors",
}

__all__ = [
    "CheckpointError",
    "LlamaSplitError",
    "MissingPackage",
    "Mode",
    "SplitLlamaForCausalLM",
    "UnsupportedBySplit",
    "WorkerFailed",
    "WorkerMismatch",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            if _HOMES[name] != "errors":
                import_module(".requirements", __name__).check_requirements()
            return getattr(import_module(f".{_HOMES[name]}", __name__), name)
        except ModuleNotFoundError as error:
            raise missing_package(error) or error from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
