"""Everything that is measured: a class behind ``Contender`` each, a file for each kind."""

from .base import Contender
from .floors import CacheLinePingPong, DealerRouterFloor, MemcpyFloor, RequestReplyFloor, SemaphorePingPong
from .grpc_unary import GrpcUnary
from .iceoryx import IceoryxEventCopyIn, IceoryxEventInPlace, IceoryxPollingCopyIn, IceoryxPollingInPlace
from .kick import KickPollingCopyIn, KickPollingInPlace, KickWaitingCopyIn, KickWaitingInPlace
from .multipart import Multipart
from .original import Original
from .ours import DoorbellCopyIn, DoorbellInPlace, SpinCopyIn, SpinInPlace, ZmqCopyIn, ZmqInPlace
from .pipe import Pipe
from .ray_calls import RayActor, RayGraph
from .shared_memory import SharedMemoryPipe
from .torch_queue import TorchQueue
from .zenoh_shm import ZenohSharedMemory

CONTENDERS: dict[str, type[Contender]] = {
    kind.name: kind
    for kind in (
        SpinInPlace,
        DoorbellInPlace,
        ZmqInPlace,
        SpinCopyIn,
        DoorbellCopyIn,
        ZmqCopyIn,
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
"""By name, in the order in which they are shown."""

__all__ = ["CONTENDERS", "Contender"]
