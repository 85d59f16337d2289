"""Serving on a Ray cluster: ``serve run llama_split.placement.ray:app``, or ``llama-split serve --ray``.

Each replica of the application is a trusted process. Its worker is an actor beside it, in the same placement group,
and is reached through shared memory: Ray places and restarts processes, and is not on the path of a token. Workers
that share the layers from other nodes are reached through an actor on their node, by Ray's own calls.

Ray pickles what its processes tell each other: all nodes of a cluster trust each other. See docs/security.md.
"""

from typing import TYPE_CHECKING, Any

from ...errors import missing_package

if TYPE_CHECKING:
    from .application import app, run

__all__ = ["app", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import application
    except ModuleNotFoundError as error:
        raise missing_package(error) or error from None
    return getattr(application, name)
