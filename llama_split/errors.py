"""What llama_split itself raises; each message says what is wrong and what to do."""

from __future__ import annotations


class LlamaSplitError(Exception):
    """Base of this package's errors."""


class MissingPackage(LlamaSplitError, ImportError):
    """A package that llama_split needs, and that shmtransport alone does not, is not installed."""

    @classmethod
    def named(cls, package: str) -> MissingPackage:
        """The error for one package."""
        return cls(f"llama_split needs the package {package}: pip install 'shmtransport[llama]'")


def missing_package(error: ModuleNotFoundError) -> MissingPackage | None:
    """The same error in words with a remedy, if it is one of this project's extra that is missing."""
    if error.name not in ("gguf", "rich", "safetensors", "transformers", "typer"):
        return None
    return MissingPackage.named(error.name)


class CheckpointError(LlamaSplitError):
    """The model's files are missing, incomplete, or of a kind that can't be split."""


class WorkerMismatch(LlamaSplitError):
    """The worker serves another model, dtype or version than this side needs."""


class WorkerFailed(LlamaSplitError):
    """A worker that this side started did not come up."""


class UnsupportedBySplit(LlamaSplitError):
    """The chosen split can't do what was asked."""


class InvalidInput(LlamaSplitError, ValueError):
    """What a forward was given does not fit together."""


class SessionLost(LlamaSplitError):
    """On the worker: the KV that a forward goes on from is not there (any more); the trusted side builds it again."""


class SessionLimit(LlamaSplitError):
    """On the worker: no room for the KV of one more session, or for a longer one."""
