"""The errors of llama_split, and the exit codes of its command line.

A message says what is wrong and, where there is a remedy, what to do.
"""

from __future__ import annotations

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_EXTRAS = {
    **dict.fromkeys(("gguf", "rich", "safetensors", "transformers", "typer"), "llama"),
    "ray": "ray",
    "cryptography": "otp",
}


class LlamaSplitError(Exception):
    """Base class of this package's errors."""


class MissingPackage(LlamaSplitError, ImportError):
    """A package that llama_split needs, and shmtransport does not, is not installed."""

    @classmethod
    def named(cls, package: str) -> MissingPackage:
        """The error for one package."""
        extra = _EXTRAS.get(package, "llama")
        return cls(f"llama_split needs the package {package}: pip install 'shmtransport[{extra}]'")


def missing_package(error: ModuleNotFoundError) -> MissingPackage | None:
    """The error with a remedy, if the missing package belongs to one of this project's extras; else None."""
    return MissingPackage.named(error.name) if error.name in _EXTRAS else None


class CheckpointError(LlamaSplitError):
    """The model's files are missing, incomplete, or describe a model that can't be split."""


class WorkerMismatch(LlamaSplitError):
    """The worker serves another model or dtype than this side needs, or returned what the boundary does not allow."""


class WorkerTampered(LlamaSplitError):
    """A worker returned a wrong result, by more than rounding explains; nothing that was computed from it is shown."""


class MasksExhausted(LlamaSplitError):
    """There is no unused mask left for what was about to be sent; nothing goes on without one."""


class WorkerFailed(LlamaSplitError):
    """A worker that this side started did not become ready."""


class UnsupportedBySplit(LlamaSplitError):
    """The chosen split can't do this."""


class InvalidInput(LlamaSplitError, ValueError):
    """The arguments of a forward don't fit together."""


class SessionLost(LlamaSplitError):
    """On the worker: the KV that a forward continues is missing or was dropped; the trusted side rebuilds it."""


class SessionLimit(LlamaSplitError):
    """On the worker: there is no room for another session, or for a session's KV."""
