"""The methods that every server answers: what it offers, how it is, and two by which its channels are measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..errors import LocalProtocolError
from ..memory.dtypes import AnyDType
from .device_sharing import OFFER, SHARE, USE

ECHO, PROBE, METHODS, HEALTH = "__echo__", "__probe__", "__methods__", "__health__"
"""ECHO returns its tensor, copied into the reply arena, or nothing for nothing; PROBE returns as many bytes of the
reply arena as it is asked for, uninitialised and not copied; METHODS and HEALTH are ``methods`` and ``health`` of a
server. ``device_sharing`` has three more."""


class BuiltIn(Protocol):
    """What the built-in methods need of a server."""

    def empty(self, shape: int | Sequence[int], dtype: AnyDType) -> torch.Tensor: ...

    def methods(self) -> list[str]: ...

    def health(self) -> dict[str, Any]: ...

    def offer_device(self) -> dict[str, Any]: ...

    def share_device(self, secret: bytes, cells: int) -> int: ...

    def use_device(self) -> None: ...


def built_in(name: str, server: BuiltIn) -> Callable[..., Any] | None:
    """Return the built-in method of this name, or None."""
    methods: dict[str, Callable[..., Any]] = {
        ECHO: _echo,
        PROBE: functools.partial(_probe, server),
        METHODS: server.methods,
        HEALTH: server.health,
        OFFER: server.offer_device,
        SHARE: server.share_device,
        USE: server.use_device,
    }
    return methods.get(name)


def _echo(tensor: torch.Tensor | None = None) -> torch.Tensor | None:
    if tensor is not None and not isinstance(tensor, torch.Tensor):
        raise LocalProtocolError(f"{ECHO} takes one tensor, or nothing")
    return tensor


def _probe(server: BuiltIn, nbytes: int, _tensor: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``nbytes`` bytes of the reply arena as they are; the tensor that was sent is ignored."""
    if type(nbytes) is not int or nbytes < 0:
        raise LocalProtocolError(f"{PROBE} takes a number of bytes, and a tensor if you like")
    return server.empty((nbytes,), torch.uint8)
