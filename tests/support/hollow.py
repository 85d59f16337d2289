"""A worker without weights: it describes itself as one of a model, and answers every operation with the right shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llama_split.boundary.compute import WORKER_DTYPE_NAMES
from llama_split.boundary.operations import OPERATIONS, Operation
from llama_split.checkpoint import Checkpoint


def hollow_handlers(
    checkpoint: Checkpoint, dtype: torch.dtype, make: Callable[[tuple[int, ...]], Any]
) -> dict[str, Callable[..., Any]]:
    """Handlers by name; ``make`` builds each result from its expected shape."""
    description = {
        "geometry": repr(checkpoint.geometry),
        "fingerprint": checkpoint.fingerprint(),
        "dtype": WORKER_DTYPE_NAMES[dtype],
        "embedding": True,
        "layers": f"0-{checkpoint.geometry.layers - 1}",
        "sessions": 64,
    }

    def handler(operation: Operation) -> Callable[..., Any]:
        def handle(*arguments: torch.Tensor, **keywords: Any) -> Any:
            wanted = keywords.get("keep", arguments[0].shape[1])
            return make(operation.result.shape(operation.bind(arguments, checkpoint.geometry, N=wanted)))

        return handle

    named = {operation.name: handler(operation) for operation in OPERATIONS}
    return {**named, "describe": lambda: description, "end_session": lambda _number: None}
