"""The round-trip contenders, one class behind ``Contender`` each: ours, other libraries', and the machine's floors."""

from __future__ import annotations

from collections.abc import Iterable

from ..harness.contender import Contender
from .floors import CacheLinePingPong, DealerRouterFloor, MemcpyFloor, RequestReplyFloor, SemaphorePingPong
from .grpc_unary import GrpcUnary
from .iceoryx import IceoryxEventCopyIn, IceoryxEventInPlace, IceoryxPollingCopyIn, IceoryxPollingInPlace
from .kick import KickPollingCopyIn, KickPollingInPlace, KickWaitingCopyIn, KickWaitingInPlace
from .multipart import Multipart
from .original import Original
from .ours import (
    DefaultInPlace,
    DoorbellCopyIn,
    DoorbellInPlace,
    SpinArraysCopyIn,
    SpinArraysInPlace,
    SpinCopyIn,
    SpinInPlace,
    ZmqCopyIn,
    ZmqInPlace,
)
from .pipe import Pipe
from .ray_calls import RayActor, RayGraph
from .shared_memory import SharedMemoryPipe
from .torch_queue import TorchQueue
from .zenoh_shm import ZenohSharedMemory

CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (
        SpinInPlace,
        DefaultInPlace,
        DoorbellInPlace,
        ZmqInPlace,
        SpinCopyIn,
        DoorbellCopyIn,
        ZmqCopyIn,
        SpinArraysInPlace,
        SpinArraysCopyIn,
        KickPollingInPlace,
        KickWaitingInPlace,
        KickPollingCopyIn,
        KickWaitingCopyIn,
        IceoryxPollingInPlace,
        IceoryxEventInPlace,
        IceoryxPollingCopyIn,
        IceoryxEventCopyIn,
        SharedMemoryPipe,
        TorchQueue,
        ZenohSharedMemory,
        Multipart,
        Pipe,
        GrpcUnary,
        RayActor,
        RayGraph,
        Original,
        MemcpyFloor,
        CacheLinePingPong,
        SemaphorePingPong,
        RequestReplyFloor,
        DealerRouterFloor,
    )
}
"""By name, in the order in which tables show them."""


def matching(text: str, names: Iterable[str]) -> list[str]:
    """The names that contain one of the comma-separated parts of ``text``, in their order; all if it is empty.

    A full name stands for itself even though it contains a comma: "zmq, copy in" selects one contender, "zmq" several.

    Raises:
        ValueError: A part matches no name.
    """
    names = list(names)
    if text in names:
        return [text]
    parts = [part.strip().lower() for part in text.split(",")]
    for part in parts:
        if not any(part in name.lower() for name in names):
            raise ValueError(f"no contender's name contains {part!r}; there are: {'; '.join(names)}")
    return [name for name in names if any(part in name.lower() for part in parts)]


def choose(text: str, moving_only: bool = False) -> list[type[Contender]]:
    """The contenders whose names match, see ``matching``; with ``moving_only`` those that carry tensors.

    Raises:
        ValueError: A part of the text matches none.
    """
    candidates = [name for name, one in CONTENDERS.items() if one.moves_tensors or not moving_only]
    return [CONTENDERS[name] for name in matching(text, candidates)]


__all__ = ["CONTENDERS", "Contender", "choose", "matching"]
