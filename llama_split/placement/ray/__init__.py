"""Serving on a Ray cluster: ``serve run llama_split.placement.ray:app``, or ``llama-split serve --ray``.

Each replica of the application is a trusted process. Its worker is an actor beside it, in the same placement group,
and is reached through shared memory: Ray places and restarts processes, and is not on the path of a token. Workers
that share the layers from other nodes are reached through an actor on their node, by Ray's own calls.

Ray pickles what its processes tell each other: all nodes of a cluster trust each other. See docs/security.md.
"""

from ...errors import missing_package

try:
    from .application import app, run
except ModuleNotFoundError as error:
    raise missing_package(error) or error from None

__all__ = ["app", "run"]
