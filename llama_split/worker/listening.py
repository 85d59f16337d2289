"""Where a worker listens: a server whose arenas are pinned for the worker's GPU, if that can be had."""

from __future__ import annotations

import logging
from typing import Any

import torch

from shmtransport import DeviceError, Server

logger = logging.getLogger("llama_split")


def server_for(address: str, device: torch.device, **options: Any) -> Server:
    """Make the server of a worker that computes on ``device``.

    Args:
        address: Where it listens.
        device: The processor, or a GPU.
        options: More of ``Server``'s.

    Raises:
        TransportError: As ``Server``; but where a GPU can't be used by the transport, torch copies by itself, slowly.
    """
    try:
        return Server(address, device=device, **options)
    except DeviceError as error:
        logger.warning("tensors cross to %s by torch's own copies, which wait: %s", device, error)
        return Server(address, **options)
