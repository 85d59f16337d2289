"""The blocking client: a thin shell that moves bytes between the protocol and a channel.

Several threads may call at once: ``turns`` says which of them receives for all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from . import options
from .backlog import QUEUE_LIMIT
from .errors import CallTimeout, Closed, PeerDied, PeerProtocolError, TransportError
from .forks import BoundToProcess, abandon_after_fork, forked
from .handshake import Sizes, Wishes
from .link import Connecting, Link, LinkOptions, check_options
from .message import DEFAULT_MAX_MESSAGE_BYTES, ChannelKind
from .protocol import PendingReply
from .statistics import Counters, Statistics
from .turns import Turns
from .uncompiled import uncompiled
from .units import MIB

DEFAULT_ARENA_BYTES = 64 * MIB
CONNECT_TIMEOUT_S = 30.0  # a server that was started together with its client imports torch first
_WATCH_SLICE_S = 0.25  # how soon a dead server is noticed while waiting for a reply
_SEND_SLICE_S = 0.05  # how soon a full queue is tried again where nothing tells that it has room


@uncompiled
class ClientBase(BoundToProcess):
    """What the blocking and the asyncio client share: options, arenas, statistics, and how a connection ends."""

    def __init__(
        self,
        address: str,
        *,
        channel: ChannelKind = "zmq",
        spin_us: float = 0.0,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        reply_arena_bytes: int | None = None,
        timeout_s: float | None = 60.0,
        connect_timeout_s: float | None = CONNECT_TIMEOUT_S,
        snapshot: bool = False,
        prefault: bool = False,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        self.address = address
        self._timeout_s = options.seconds_or_no_limit("timeout_s", timeout_s)
        self._counters = Counters()
        self._link: Link | None = None
        self._ended: TransportError | None = None
        request_bytes = options.whole("arena_bytes", arena_bytes)
        reply_bytes = (
            request_bytes if reply_arena_bytes is None else options.whole("reply_arena_bytes", reply_arena_bytes)
        )
        wishes = Wishes(
            Sizes(request_bytes, reply_bytes),
            options.message_bytes(max_message_bytes),
            options.channel_kind(channel),
            options.flag("snapshot", snapshot),
            self._claim_timeout_s(),
        )
        self._options = LinkOptions(
            address,
            wishes,
            options.seconds_or_no_limit("connect_timeout_s", connect_timeout_s),
            options.seconds("spin_us", spin_us),
            options.flag("prefault", prefault),
        )
        self.transport = check_options(self._options)
        abandon_after_fork(self)

    @property
    def channel(self) -> ChannelKind:
        """The kind of channel that carries the control messages: "zmq" or "doorbell"."""
        return self._options.wishes.channel

    @property
    def server_pid(self) -> int:
        """The server's process id, from the kernel."""
        return self._live().server_pid

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A loan: an uninitialised CPU tensor in the request arena, sent later without a copy.

        It may be sent several times, and in several calls at once. Its memory is used again once it and all views of
        it are gone, here and at the server.

        Raises:
            ArenaFull: no room, not even after the time that a call may take; at once where waiting can't help.
            TensorTooLarge: there will never be room.
            LocalProtocolError: no tensor of this shape or dtype can be sent.
            Closed, PeerDied.
        """
        link = self._live()
        try:
            return link.connection.send_arena.empty(shape, dtype)
        except Closed:
            self._live()  # what another thread has ended it with
            raise

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """As ``empty``, with the shape and dtype of another tensor."""
        return self.empty(tensor.shape, tensor.dtype)

    def statistics(self) -> Statistics:
        """Totals since this client was made."""
        return self._counters.snapshot()

    def abandon(self) -> None:
        """In a forked child: end without touching what is the parent's."""
        if self._ended is None:
            self._ended = forked("the connection")
            if self._link is not None:
                self._link.protocol.fail_all(self._ended)
        if self._link is not None:
            self._link.abandon()

    def _claim_timeout_s(self) -> float:
        """How long a claim may block this thread."""
        return self._timeout_s

    def _live(self) -> Link:
        if self._ended is not None:
            raise type(self._ended)(*self._ended.args)
        if self._link is None:
            raise Closed("this client is not connected yet: use it in an 'async with' block, or await connect()")
        return self._link

    def _flush(self) -> bool:
        """Whether a goodbye is under way that should still go out."""
        return isinstance(self._ended, (Closed, PeerProtocolError))

    def _timeout_error(self, link: Link, pending: PendingReply, timeout_s: float) -> CallTimeout:
        return CallTimeout(
            f"no reply to {pending.method!r} within {timeout_s:g} s; {len(link.protocol) - 1} other calls in flight; "
            f"the server (process {link.server_pid}) is alive: raise timeout_s or look at its log"
        )

    def _full_error(self) -> CallTimeout:
        return CallTimeout(
            f"the request was not sent: the queue to the server stayed full for {self._timeout_s:g} s: is it stopped?"
        )


@uncompiled
class Client(ClientBase):
    """A connection to a ``Server`` on this machine.

    ``channel`` is what carries requests and replies: "zmq", or "doorbell" (a ring in shared memory and a semaphore:
    about two thirds of the time, or a quarter if both sides look for ``spin_us`` microseconds before they wait, at the
    price of busy cores). ``arena_bytes`` is the size of the data area for what this side sends, ``reply_arena_bytes``
    (default: the same) of the one for what it receives; with ``prefault`` all of their pages are mapped now, not on
    first use. ``timeout_s`` is how long a call may take unless it says otherwise, and how long a claim waits for
    room; ``connect_timeout_s`` is how long to wait for a server, which may be started after its client. None: no limit.
    ``max_message_bytes`` bounds the plain values of a call or result; the server's own bound counts as well.
    With ``snapshot`` results are private copies rather than borrowed views: for a caller that checks a result before
    it uses it, since a hostile server could change a view in between.

    May be used by several threads. Not by a forked child, where every use raises ``Closed``. Close it, or use it in a
    ``with`` block: until then, or until this process ends, the server keeps what it has granted.

    Raises:
        ConnectTimeout: nobody answers at ``address`` within ``connect_timeout_s``.
        ConnectRefused: the server refuses, with its figures.
        AddressError, SegmentError, PeerProtocolError, LocalProtocolError.
    """

    def __init__(
        self,
        address: str,
        *,
        channel: ChannelKind = "zmq",
        spin_us: float = 0.0,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        reply_arena_bytes: int | None = None,
        timeout_s: float | None = 60.0,
        connect_timeout_s: float | None = CONNECT_TIMEOUT_S,
        snapshot: bool = False,
        prefault: bool = False,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        super().__init__(
            address,
            channel=channel,
            spin_us=spin_us,
            arena_bytes=arena_bytes,
            reply_arena_bytes=reply_arena_bytes,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            snapshot=snapshot,
            prefault=prefault,
            max_message_bytes=max_message_bytes,
        )
        self._reset_threads()
        self._link = Link(Connecting(self._options, self._counters))

    def call(self, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """Call a method of the server and wait for its result; see ``submit`` and ``PendingReply.result``."""
        try:
            return self.submit(method, *arguments, **keywords).result()
        finally:
            del arguments, keywords  # whoever keeps an error's traceback keeps this frame

    def submit(self, method: str, /, *arguments: Any, **keywords: Any) -> PendingReply:
        """Start a call without waiting for its result; several may be in flight.

        Tensors (torch, numpy, or anything with ``__dlpack__``) may stand anywhere in nested lists, tuples and dicts
        of plain values. One that lies in this client's arena is sent as it is and must not be changed until the reply
        is there; any other is copied in once, detached. Where there is no room, this waits until the server has
        released some.

        Raises:
            ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError: nothing was sent.
            CallTimeout: nothing was sent, since the server reads nothing.
            Closed, PeerDied.
        """
        link = self._live()
        pending = PendingReply(method, self._wait)
        try:
            data = link.protocol.request(pending, arguments, keywords)
        except PeerDied as error:
            with self._lock:
                self._end(link, error)
            raise
        except Closed:
            self._live()  # what another thread has ended it with
            raise
        with self._lock:
            try:
                self._start(link, pending, data)
            except BaseException:
                link.protocol.take_back(pending)
                raise
        return pending

    def reconnect(self) -> None:
        """Connect anew, to whichever server is at the address now; calls in flight fail with ``Closed``.

        Results and loans of the old connection stay valid; such a loan is copied if it is sent.

        Raises:
            As the constructor; afterwards this may be tried again.
        """
        with self._lock:
            self._close("the client reconnects")
            while self._turns.taken():
                self._turns.wait_for_receiver()
                self._close("the client reconnects")  # what another thread has connected meanwhile
            self._link = Link(Connecting(self._options, self._counters))
            self._ended = None

    def close(self) -> None:
        """End the connection; calls in flight fail with ``Closed``. Results stay valid. A second call does nothing."""
        with self._lock:
            self._close("this client was closed")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def abandon(self) -> None:
        self._reset_threads()  # the lock may have been held by a thread that this process doesn't have
        super().abandon()

    def _reset_threads(self) -> None:
        self._turns = Turns()
        self._lock = self._turns.lock

    # From here on, all with the lock held.

    def _start(self, link: Link, pending: PendingReply, data: bytes) -> None:
        """Send a request; waits while the queue is full."""
        if self._live() is not link:
            raise Closed("the client was reconnected while this request was being made")
        link.protocol.start(pending)
        if not self._send(link, data):
            self._send_when_possible(link, pending, data)
        if self._turns.received_for:  # sending may have taken away what would have told the receiver of a reply
            self._receive_all(link)

    def _send_when_possible(self, link: Link, pending: PendingReply, data: bytes) -> None:
        self._counters.stalls += 1
        started = time.monotonic()
        try:
            while not self._send(link, data):
                if time.monotonic() - started >= self._timeout_s:
                    raise self._full_error()
                self._step(link, pending, _SEND_SLICE_S)
                self._live()
        finally:
            self._counters.stall_seconds += time.monotonic() - started
            self._turns.hand_over()

    def _send(self, link: Link, data: bytes) -> bool:
        try:
            return link.channel.send(data)
        except PeerProtocolError as error:
            self._end(link, error)
            raise

    def _wait(self, pending: PendingReply, timeout_s: float | None) -> None:
        """Wait until this call is done, its time is up, or the server is dead."""
        timeout_s = self._timeout_s if timeout_s is None else options.seconds_or_no_limit("timeout_s", timeout_s)
        left_s = timeout_s
        started = time.monotonic()
        with self._lock:
            try:
                while not pending.done:
                    link = self._live()
                    if left_s <= 0:
                        self._receive_all(link)
                        if not pending.done and self._ended is None:
                            link.protocol.give_up(pending, self._timeout_error(link, pending, timeout_s))
                    else:
                        self._step(link, pending, left_s)
                        left_s = timeout_s - (time.monotonic() - started)
            finally:
                self._turns.hand_over()

    def _step(self, link: Link, key: object, timeout_s: float) -> None:
        """Receive for all, or wait while another thread does."""
        if self._turns.taken():
            self._turns.follow(key, timeout_s)
        elif link.channel.looks_first or not self._receive(link):
            self._wait_as_receiver(link, key, min(timeout_s, _WATCH_SLICE_S))

    def _wait_as_receiver(self, link: Link, key: object, timeout_s: float) -> None:
        try:
            self._counters.waits += self._turns.receive(key, link.channel.wait, timeout_s)
        finally:
            current = link is self._link and self._ended is None
            if self._turns.received_for:  # the call that this one interrupted looks at once whether its reply has come
                link.channel.wake()
            elif not current:  # what ended it has left the closing to this thread
                link.close(flush=self._flush())
        if current and not self._receive(link) and (error := link.died()) is not None:
            self._receive_all(link)  # the replies that it sent before
            self._end(link, error)

    def _receive(self, link: Link) -> bool:
        """Take the next message, if there is one."""
        try:
            data = link.channel.receive()
            if data is None:
                return False
            completed = link.protocol.receive(data)
        except PeerDied as error:
            self._end(link, error)
        except PeerProtocolError as error:
            link.say_goodbye("protocol error")
            self._end(link, error)
        else:
            if completed is None:
                pass
            elif self._turns.call(completed):  # received by another thread or an inner call: nothing else may wake it
                link.channel.wake()
        return True

    def _receive_all(self, link: Link) -> None:
        for _ in range(QUEUE_LIMIT):  # a server that sends without end must not keep this thread
            if self._ended is not None or not self._receive(link):
                return

    def _close(self, reason: str) -> None:
        link = self._link
        if self._ended is None and link is not None:
            link.say_goodbye(reason)
            self._end(link, Closed(reason))

    def _end(self, link: Link, error: TransportError) -> None:
        """End this connection for good, with what every later use of it will raise."""
        if self._ended is not None or self._link is not link:
            return
        self._ended = error
        link.protocol.fail_all(error)
        self._turns.call_all()
        if self._turns.received_for:
            link.channel.wake()
        else:
            link.close(flush=self._flush())
