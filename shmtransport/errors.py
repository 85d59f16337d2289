"""Defines every error that this package raises, by whose fault it is.

::

    TransportError
    ├── SegmentError          the machine: shared memory could not be obtained or mapped
    ├── OutOfResources        the machine: too few file descriptors or threads are left
    ├── DeviceError           the machine: there is no such GPU, or it or its driver failed
    ├── AddressError          you: the address is malformed, unsafe or already served
    ├── ArenaFull             you: too much is held at once, or the arena is too small
    ├── TensorTooLarge        you: this tensor can never fit the arena
    ├── MessageTooLarge       you: plain values too large for a control message
    ├── ConnectTimeout        no server answered at the address  (also a TimeoutError)
    ├── ConnectRefused        the server answered and refused    (also a ConnectionError)
    ├── CallTimeout           the reply did not come in time     (also a TimeoutError)
    ├── CallCancelled         you: this call was cancelled       (also concurrent.futures' CancelledError)
    ├── PeerDied              the other process has ended        (also a ConnectionError)
    ├── Closed                you: this client or server was closed
    ├── RemoteError           the handler raised; only its type and message travel
    └── ProtocolError
        ├── LocalProtocolError    you asked for something that the protocol can't carry
        └── PeerProtocolError     the peer sent something invalid

Messages give count, limit and remedy. All errors survive pickle and copy, so that a process pool can pass them on.
"""

from __future__ import annotations

from concurrent.futures import CancelledError


class TransportError(Exception):
    """Base of every error raised by shmtransport."""

    sent = False
    """Whether the call that it ended was sent, so that the server may have handled it."""


class SegmentError(TransportError):
    """Shared memory could not be created, reserved, opened or mapped."""


class OutOfResources(TransportError):
    """This process has too few file descriptors left, or can't start a thread."""


class DeviceError(TransportError):
    """There is no such GPU, or it or its driver refused something or failed."""


class AddressError(TransportError):
    """An address is malformed, unsafe to bind, or already served by a living process."""


class ArenaFull(TransportError):
    """No gap in the arena is large enough now; releasing loans or results makes room."""


class TensorTooLarge(TransportError):
    """A tensor is larger than the whole arena, so waiting can't help."""


class MessageTooLarge(TransportError):
    """The plain values of a call don't fit one control message."""


class ConnectTimeout(TransportError, TimeoutError):
    """No server answered at the address within ``connect_timeout_s``."""


class ConnectRefused(TransportError, ConnectionError):
    """The server refused the connection; the message gives its reason, with figures."""


class CallTimeout(TransportError, TimeoutError):
    """The reply did not arrive within ``timeout_s``."""


class CallCancelled(TransportError, CancelledError):
    """The call was cancelled by its own process."""


class PeerDied(TransportError, ConnectionError):
    """The other process ended or no longer knows this connection."""


class Closed(TransportError):
    """The client or server was closed by its own process."""


class RemoteError(TransportError):
    """A handler raised on the server.

    ``type_name`` is the exception's class name and ``message`` its text. ``remote_traceback`` is empty unless the
    server is in debug mode: a traceback shows the server's files.
    """

    def __init__(self, type_name: str, message: str, remote_traceback: str = "") -> None:
        super().__init__(type_name, message, remote_traceback)  # from which pickle and copy make it again
        self.type_name = type_name
        self.message = message
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        told = f"the server's handler raised {self.type_name}: {self.message}"
        return f"{told}\n\nOn the server:\n{self.remote_traceback}" if self.remote_traceback else told


class ProtocolError(TransportError):
    """Base of the two kinds of broken protocol."""


class LocalProtocolError(ProtocolError):
    """This process asked for something that can't be sent."""


class PeerProtocolError(ProtocolError):
    """The peer sent something invalid; the connection is not used any longer."""
