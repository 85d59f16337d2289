"""Everything that is measured: a class behind ``Contender`` each."""

from .base import Contender
from .floors import SemaphorePingPong
from .original import Original
from .ours import CopyIn, DoorbellInPlace, InPlace, SpinningInPlace
from .raw import DealerRouter, RawSocket

CONTENDERS: dict[str, type[Contender]] = {
    kind.name: kind
    for kind in (
        SpinningInPlace,
        DoorbellInPlace,
        InPlace,
        CopyIn,
        RawSocket,
        DealerRouter,
        SemaphorePingPong,
        Original,
    )
}
"""By name, in the order in which they are shown."""

__all__ = ["CONTENDERS", "Contender"]
