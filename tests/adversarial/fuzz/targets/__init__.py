"""Everything that decodes a peer's bytes or values without a socket; each target defines a valid outcome.

A target's input is one string of bytes, from which all that it does follows, so that an input that breaks the rule can
be put in again. Where a peer would name something that exists for this run only (its segment), the input has a
stand-in of fixed form.
"""

from __future__ import annotations

from collections.abc import Callable

from ..rule import Target
from .handshakes import ClientAdmission, ClientHandshake
from .memory import Borrowing, HeaderReading, Validating
from .message_ring import RingReading
from .messages import Decoding, Unpacking
from .protocols import ClientReceiving, ServerReceiving

TARGETS: tuple[Callable[[], Target], ...] = (
    Decoding,
    Unpacking,
    Validating,
    HeaderReading,
    Borrowing,
    ClientReceiving,
    ServerReceiving,
    ClientHandshake,
    ClientAdmission,
    RingReading,
)
