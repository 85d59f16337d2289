"""The blocking client: a thin shell that moves bytes between the protocol and a channel."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any

import torch

from . import address as addresses
from .channel import Channel, ZmqChannel, deadline_in
from .connection import Connection
from .errors import CallTimeout, Closed, ConnectTimeout, LocalProtocolError, PeerDied, PeerProtocolError, TransportError
from .handshake import Sizes, client_handshake
from .message import DEFAULT_MAX_MESSAGE_BYTES, Goodbye, encode
from .protocol import ClientProtocol, PendingReply
from .statistics import Counters, Statistics
from .units import MIB, size_text

logger = logging.getLogger("shmtransport")

DEFAULT_ARENA_BYTES = 64 * MIB
_WATCH_SLICE_S = 0.25  # how soon a dead server is noticed while waiting for a reply


class Client:
    """A connection to a ``Server`` on this machine.

    ``arena_bytes`` is the size of the data area for what this side sends, ``reply_arena_bytes`` (default: the same)
    of the one for what it receives. ``timeout_s`` is how long a call may take unless it says otherwise.
    ``max_message_bytes`` bounds the plain values of a call or result; the server's own bound counts as well. With
    ``snapshot`` results are private copies rather than borrowed views: for a caller that checks a result before it
    uses it, since a hostile server could change a view in between.

    May be used by several threads; inside they take turns, so that one waits while another's call is under way. Close
    it, or use it in a ``with`` block: until then, or until this process ends, the server keeps what it has granted.

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
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        self.address = address
        self.transport = addresses.check_connect(address)
        self._timeout_s = timeout_s
        self._counters = Counters()
        self._lock = threading.RLock()
        self._ended: TransportError | None = None
        sizes = Sizes(arena_bytes, arena_bytes if reply_arena_bytes is None else reply_arena_bytes)
        if min(sizes) < 1:
            raise LocalProtocolError(f"arenas need at least one byte each; {tuple(sizes)} were asked for")
        self._channel: Channel = ZmqChannel(address, max_message_bytes)
        handshake = client_handshake(sizes, max_message_bytes, self._counters, snapshot=snapshot)
        try:
            self._connection = self._connect(handshake, connect_timeout_s)
        except BaseException as error:
            handshake.close()
            answered = not isinstance(error, ConnectTimeout)
            if answered:  # the server counts this client as coming
                self._say_goodbye("connecting failed")
            self._channel.close(flush=answered)
            raise
        self._protocol = ClientProtocol(self._connection.codec, self._counters)
        logger.info(
            "connected to %s (%s, %s channel): request arena %s, reply arena %s, server process %d",
            address,
            self.transport,
            self._channel.kind,
            size_text(sizes.request_arena_bytes),
            size_text(sizes.reply_arena_bytes),
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
            CallTimeout: nothing was sent, since the server has read nothing for very many messages.
            Closed, PeerDied.
        """
        with self._lock:
            self._live()
            pending, data = self._protocol.request(method, arguments, keywords, self._wait)
            try:
                self._channel.send(data)
            except CallTimeout:
                self._protocol.take_back(pending)
                raise
            return pending

    def statistics(self) -> Statistics:
        """Totals since this client was made."""
        return self._counters.snapshot()

    def close(self) -> None:
        """End the connection; calls in flight fail with ``Closed``. Results stay valid. A second call does nothing."""
        with self._lock:
            if self._ended is None:
                self._say_goodbye("the client closed the connection")
            self._end(Closed("this client was closed"))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _live(self) -> Connection:
        if self._ended is not None:
            raise type(self._ended)(*self._ended.args)
        return self._connection

    def _end(self, error: TransportError) -> None:
        """End this client for good, with what every later use of it will raise."""
        if self._ended is not None:
            return
        self._ended = error
        self._channel.close(flush=isinstance(error, (Closed, PeerProtocolError)))
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
                elif not self._connection.watch.alive():
                    died = PeerDied(f"the server at {self.address} (process {self.server_pid}) has ended")
                    self._drain()
                    self._end(died)
                elif left <= 0:
                    self._protocol.give_up(pending, self._timeout_error(pending, timeout_s))

    def _timeout_error(self, pending: PendingReply, timeout_s: float) -> CallTimeout:
        return CallTimeout(
            f"no reply to {pending.method!r} within {timeout_s:g} s; {len(self._protocol) - 1} other calls in flight; "
            f"the server (process {self.server_pid}) is alive: raise timeout_s or look at its log"
        )

    def _take(self, data: bytes) -> None:
        try:
            self._protocol.receive(data)
        except PeerDied as error:
            self._end(error)
        except PeerProtocolError as error:
            self._say_goodbye("protocol error")
            self._end(error)

    def _say_goodbye(self, reason: str) -> None:
        """Tell the server that it may free this client's share, if it still reads."""
        with contextlib.suppress(CallTimeout):
            self._channel.send(encode(Goodbye(reason)))

    def _drain(self) -> None:
        """Take the replies that a server sent before it died."""
        while self._ended is None and (data := self._channel.receive(0.0)) is not None:
            self._take(data)

    def _connect(self, handshake: Generator[bytes, bytes, Connection], timeout_s: float) -> Connection:
        deadline = deadline_in(timeout_s)
        data = next(handshake)
        while True:
            self._channel.send(data)
            answer = self._channel.receive(max(deadline - time.monotonic(), 0.0))
            if answer is None:
                raise ConnectTimeout(
                    f"no server answered at {self.address} within {timeout_s:g} s: start one, check the address, "
                    "or raise connect_timeout_s if it is still starting"
                )
            try:
                data = handshake.send(answer)
            except StopIteration as end:
                connection: Connection = end.value
                return connection
