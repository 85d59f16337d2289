"""The blocking client: a thin shell that moves bytes between the protocol and a channel."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from . import address as addresses
from .channel import Channel, ZmqChannel, deadline_in
from .connection import Connection, attach_peer, segment_layout
from .errors import CallTimeout, Closed, ConnectRefused, ConnectTimeout, PeerDied, PeerProtocolError, TransportError
from .message import (
    DEFAULT_MAX_MESSAGE_BYTES,
    AnyMessage,
    Attach,
    Goodbye,
    Hello,
    Offer,
    Refused,
    Welcome,
    decode,
    encode,
)
from .protocol import ClientProtocol, PendingReply
from .segment import MIB, Segment
from .statistics import Counters, Statistics

logger = logging.getLogger("shmtransport")

DEFAULT_ARENA_BYTES = 64 * MIB
_WATCH_SLICE_S = 0.25  # how soon a dead server is noticed while waiting for a reply


class Client:
    """A connection to a ``Server`` on this machine.

    ``arena_bytes`` is the size of the data area for what this side sends, ``reply_arena_bytes`` (default: the same)
    of the one for what it receives. ``timeout_s`` is how long a call may take unless it says otherwise. With
    ``snapshot`` results are private copies rather than borrowed views: for a caller that checks a result before it
    uses it, since a hostile server could change a view in between.

    May be used by several threads, one at a time inside.

    Raises:
        ConnectTimeout: nobody answers at ``address`` within ``connect_timeout_s``.
        ConnectRefused: the server refuses, with its figures.
        AddressError, SegmentError, PeerProtocolError.
    """

    def __init__(
        self,
        address: str,
        *,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        reply_arena_bytes: int | None = None,
        timeout_s: float = 60.0,
        connect_timeout_s: float = 5.0,
        snapshot: bool = False,
    ) -> None:
        self.address = address
        self.transport = addresses.check_connect(address)
        self._timeout_s = timeout_s
        self._counters = Counters()
        self._lock = threading.RLock()
        self._ended: TransportError | None = None
        self._connection: Connection | None = None
        self._channel: Channel = ZmqChannel(address, DEFAULT_MAX_MESSAGE_BYTES)
        sizes = (arena_bytes, arena_bytes if reply_arena_bytes is None else reply_arena_bytes)
        try:
            self._connection = self._connect(sizes, snapshot, deadline_in(connect_timeout_s), connect_timeout_s)
        except BaseException:
            self._channel.close()
            raise
        self._protocol = ClientProtocol(self._connection.codec, self._counters)
        logger.info(
            "connected to %s (%s, %s channel): request arena %.1f MiB, reply arena %.1f MiB, server process %d",
            address,
            self.transport,
            self._channel.kind,
            sizes[0] / MIB,
            sizes[1] / MIB,
            self._connection.watch.pid,
        )

    @property
    def channel(self) -> str:
        """The kind of channel that carries the control messages: "zmq"."""
        return self._channel.kind

    @property
    def server_pid(self) -> int:
        """The server's process id, from the kernel."""
        return self._live().watch.pid

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A loan: an uninitialised CPU tensor in the request arena, sent later without a copy.

        Raises:
            ArenaFull, TensorTooLarge: no room now, or never.
        """
        return self._live().send_arena.empty(shape, dtype)

    def call(self, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """Call a method of the server and wait for its result; see ``submit`` and ``PendingReply.result``."""
        return self.submit(method, *arguments, **keywords).result()

    def submit(self, method: str, /, *arguments: Any, **keywords: Any) -> PendingReply:
        """Start a call without waiting; several may be in flight.

        Tensors (torch or numpy) may stand anywhere in nested lists, tuples and dicts of plain values. One that lies
        in this client's arena is sent as it is and must not be changed until the reply is there; any other is copied
        in once, detached.

        Raises:
            ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError: nothing was sent.
            Closed, PeerDied.
        """
        with self._lock:
            self._live()
            pending, data = self._protocol.request(method, arguments, keywords, self._wait)
            self._channel.send(data)
            return pending

    def statistics(self) -> Statistics:
        """Totals since this client was made."""
        return self._counters.snapshot()

    def close(self) -> None:
        """End the connection; calls in flight fail with ``Closed``. Results stay valid. A second call does nothing."""
        with self._lock:
            if self._connection is not None and self._ended is None:
                self._channel.send(encode(Goodbye("the client closed the connection")))
            self._end(Closed("this client was closed"))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _live(self) -> Connection:
        if self._ended is not None:
            raise type(self._ended)(*self._ended.args)
        assert self._connection is not None
        return self._connection

    def _end(self, error: TransportError) -> None:
        """End this client for good, with what every later use of it will raise."""
        if self._ended is not None:
            return
        self._ended = error
        self._channel.close()
        if self._connection is not None:
            self._connection.close()
            self._protocol.fail_all(error)

    def _wait(self, pending: PendingReply, timeout_s: float | None) -> None:
        """Receive until this call is done, its time is up, or the server is dead."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = deadline_in(timeout_s)
        with self._lock:
            while not pending.done:
                self._live()
                left = deadline - time.monotonic()
                data = self._channel.receive(min(_WATCH_SLICE_S, max(left, 0.0)))
                if data is not None:
                    self._take(data)
                elif not self._live().watch.alive():
                    self._drain()
                    self._end(PeerDied(f"the server at {self.address} (process {self.server_pid}) has ended"))
                elif left <= 0:
                    self._protocol.forget(pending)
                    raise CallTimeout(
                        f"no reply to {pending.method!r} within {timeout_s:g} s; {len(self._protocol)} other calls in "
                        f"flight; the server (process {self.server_pid}) is alive: raise timeout_s or look at its log"
                    )

    def _take(self, data: bytes) -> None:
        try:
            self._protocol.receive(data)
        except (PeerProtocolError, PeerDied) as error:
            self._end(error)

    def _drain(self) -> None:
        """Take the replies that a server sent before it died."""
        while self._ended is None and (data := self._channel.receive(0.0)) is not None:
            self._take(data)

    def _connect(self, sizes: tuple[int, int], snapshot: bool, deadline: float, connect_timeout_s: float) -> Connection:
        def expect(kind: type[Any]) -> Any:
            return self._expect(kind, deadline, connect_timeout_s)

        self._channel.send(encode(Hello(*sizes)))
        offer: Offer = expect(Offer)
        own = Segment.create(segment_layout(sizes[0]))
        peer: Segment | None = None
        try:
            self._channel.send(encode(Attach(own.name, os.getpid())))
            welcome: Welcome = expect(Welcome)
            peer = attach_peer(welcome.segment, sizes[1])
            own.unlink()
            return Connection(own, peer, welcome.pid, self._counters, offer.max_message_bytes, snapshot=snapshot)
        except BaseException:
            own.close()
            if peer is not None:
                peer.close()
            raise

    def _expect(self, kind: type[Any], deadline: float, connect_timeout_s: float) -> AnyMessage:
        data = self._channel.receive(max(deadline - time.monotonic(), 0.0))
        if data is None:
            raise ConnectTimeout(
                f"no server answered at {self.address} within {connect_timeout_s:g} s: start one, or check the address"
            )
        message = decode(data)
        if isinstance(message, Refused):
            raise ConnectRefused(f"the server at {self.address} refused: {message.reason}")
        if not isinstance(message, kind):
            raise PeerProtocolError(f"the server sent a {type(message).__name__} where {kind.__name__} is due")
        return message
