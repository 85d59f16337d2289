"""Everything that is measured: a class behind ``Contender`` each."""

from .base import Contender
from .original import Original
from .ours import CopyIn, InPlace
from .raw import RawSocket

CONTENDERS: dict[str, type[Contender]] = {kind.name: kind for kind in (InPlace, CopyIn, RawSocket, Original)}
"""By name, in the order in which they are shown."""

__all__ = ["CONTENDERS", "Contender"]
