"""The blocking client; ``exchange`` does its work."""

from __future__ import annotations

import functools
import time
from types import TracebackType
from typing import Any

import torch

from ..core import Counters
from ..cuda.copies import copies_for
from ..cuda.gpu import Gpu
from ..errors import Closed, ConnectRefused, LocalProtocolError, PeerDied
from ..protocol.in_flight import CallInFlight, StreamInFlight
from ..protocol.messages import DEFAULT_MAX_MESSAGE_BYTES, ChannelKind
from ..protocol.uncompiled import uncompiled
from .built_in import ECHO, HEALTH, METHODS
from .client_base import ClientBase
from .client_connection import ClientConnection, Connecting
from .exchange import Exchange
from .options import CONNECT_TIMEOUT_S, DEFAULT_ARENA_BYTES, ClientOptions, parts_ahead, seconds_or_no_limit, whole
from .pending_reply import PendingReply
from .reply_stream import READ_AHEAD, ReplyStream

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


@uncompiled
class Client(ClientBase[ClientConnection]):
    """A connection to a ``Server`` on this machine.

    Several threads may use it. In a forked child every use raises ``Closed`` until ``reconnect`` is called. Close it,
    or use it in a ``with`` block; one that is dropped without that gives everything back too, and warns.

    Args:
        address: Where the server listens: ``ipc:///absolute/path``, or ``tcp://`` with a loopback address.
        channel: What carries requests and replies: "zmq", or "doorbell" (message rings in shared memory and a
            futex; quicker, and with ``spin_us`` much quicker).
        spin_us: How long the doorbell channel polls for a reply before it blocks, in microseconds. It keeps a core
            busy for as long. None: for up to 50 where replies have been coming as fast as that, else not at all.
        arena_bytes: Room for the tensors that this side sends, in bytes.
        reply_arena_bytes: Room for the tensors that it receives, in bytes; None for as much.
        timeout_s: How long a call may take, and how long a claim waits for room, in seconds; None for no limit.
        connect_timeout_s: How long to wait for a server, which may be started after its client; None for no limit.
        snapshot: Return private copies of results in place of borrowed views: for a caller that checks a result
            before it uses it, since a hostile server could change a view in between.
        prefault: Map all pages of both arenas now, rather than on first use.
        max_message_bytes: The largest message: a call's or result's plain values. The server has its own limit too.
        device: The GPU of this side, such as "cuda:0". If the server uses the same, tensors on it are sent in place and
            never leave it; see ``empty`` and ``device_path``.

    Raises:
        ConnectTimeout: No server answers at ``address`` within ``connect_timeout_s``.
        ConnectRefused: The server refuses, with its figures.
        AddressError, LocalProtocolError: The address or an option is wrong.
        SegmentError, OutOfResources: Shared memory, file descriptors or threads are short.
        DeviceError: There is no such GPU, or no driver for it.
        PeerDied, PeerProtocolError: The server ended, or answered something invalid.
    """

    def __init__(
        self,
        address: str,
        *,
        channel: ChannelKind = "zmq",
        spin_us: float | None = None,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        reply_arena_bytes: int | None = None,
        timeout_s: float | None = 60.0,
        connect_timeout_s: float | None = CONNECT_TIMEOUT_S,
        snapshot: bool = False,
        prefault: bool = False,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        device: str | torch.device | None = None,
    ) -> None:
        options = ClientOptions.checked(
            channel=channel,
            spin_us=spin_us,
            arena_bytes=arena_bytes,
            reply_arena_bytes=reply_arena_bytes,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            snapshot=snapshot,
            prefault=prefault,
            max_message_bytes=max_message_bytes,
            device=device,
        )
        if options.snapshot and options.device is not None:
            raise LocalProtocolError("snapshot copies results in ordinary memory only: leave out snapshot or device")
        counters = Counters()
        gpu = None if options.device is None else Gpu(options.device)
        new_copies = None if gpu is None else copies_for(gpu)
        connecting = functools.partial(Connecting, address, options, options.timeout_s, counters, new_copies)
        self._gpu = gpu
        self._exchange = Exchange(connecting, options.timeout_s, counters, gpu)
        super().__init__(address, options, counters, self._exchange)
        self._exchange.connect()

    def call(self, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """Call a method of the server and wait for its result, for ``timeout_s`` in all; see ``submit``.

        Raises:
            CallTimeout: No result in time; what a late reply holds is released.
            RemoteError: The handler raised.
            TransportError: As ``submit`` and ``PendingReply.result``.
        """
        given = [(arguments, keywords)]
        del arguments, keywords  # what the caller does not keep is free as soon as the server is done with it
        return self._exchange.call(method, given, self._options.timeout_s)

    def submit(self, method: str, /, *arguments: Any, **keywords: Any) -> PendingReply:
        """Start a call without waiting for its result; any number may be in flight.

        Tensors (torch, numpy, or anything with ``__dlpack__``) may stand anywhere in nested lists, tuples and dicts
        of plain values. A tensor in this client's arena is sent in place and must not be changed until the reply has
        arrived; any other is detached and copied in once. If there is no room, this waits for the server to release
        some.

        Args:
            method: The name of the method.
            *arguments: What the handler is called with.
            **keywords: Likewise; none of them is an option of the call (see ``with_options``).

        Raises:
            ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError: The call can't be sent.
            CallTimeout: The call could not be sent in time, because the server does not read.
            Closed, PeerDied: The connection has ended.
        """
        call = self._exchange.begin(CallInFlight(method), arguments, keywords, self._options.timeout_s)
        return PendingReply(call, self._exchange)

    def send(self, method: str, /, *arguments: Any, **keywords: Any) -> None:
        """Call a method without waiting for it and without an answer; what it raises is logged at the server.

        Calls of one client are handled in the order in which they were made, these among the others.

        Raises:
            TransportError: As ``submit``.
        """
        self._exchange.send(method, arguments, keywords, self._options.timeout_s)

    def stream(self, method: str, /, *arguments: Any, **keywords: Any) -> ReplyStream:
        """Call a method that is a generator, and return an iterator over what it yields.

        ``for part in client.stream("method", …)``. The server is a few parts ahead at most (``read_ahead`` of
        ``with_options``), and these take up room of the reply arena. ``close``, which leaving a ``with`` block does,
        ends the generator.

        Raises:
            TransportError: As ``submit``.
        """
        call = self._exchange.begin(StreamInFlight(method, READ_AHEAD), arguments, keywords, self._options.timeout_s)
        return ReplyStream(call, self._exchange, self._options.timeout_s)

    def ping(self) -> float:
        """Return how long a call that does nothing takes, in seconds; raises as ``call``."""
        started = time.perf_counter()
        self.call(ECHO)
        return time.perf_counter() - started

    def methods(self) -> list[str]:
        """Return the names of the server's methods, sorted; raises as ``call``."""
        names: list[str] = self.call(METHODS)
        return names

    def health(self) -> dict[str, Any]:
        """Return how the server is; see ``Server.health``. Raises as ``call``."""
        facts: dict[str, Any] = self.call(HEALTH)
        return facts

    def with_options(
        self, *, timeout_s: float | None = None, retries: int = 0, read_ahead: int = READ_AHEAD
    ) -> CallOptions:
        """Return this client with other options for the calls made by it: ``client.with_options(…).call(…)``.

        Args:
            timeout_s: How long a call may take in all, in seconds: waiting for room, sending, the reply. None for the
                client's. A call that is repeated has this long each time.
            retries: How often ``call`` repeats a call whose connection was lost, over a new connection if no other
                thread has made one; for calls that are safe to repeat, since the lost one may have been handled.
            read_ahead: How many parts of a stream the server may make before they are taken.

        Raises:
            LocalProtocolError: An option is wrong.
        """
        return CallOptions(
            self._exchange,
            self._options.timeout_s if timeout_s is None else seconds_or_no_limit("timeout_s", timeout_s),
            whole("retries", retries, least=0),
            parts_ahead("read_ahead", read_ahead),
        )

    def reconnect(self) -> None:
        """Connect again, to the server that is at the address now; calls in flight fail with ``Closed``.

        Threads that lost the same connection make one new one together. Results and loans of the old connection stay
        valid; such a loan is copied if it is sent.

        Raises:
            TransportError: As the constructor; afterwards this may be tried again.
        """
        self._exchange.reconnect()

    def close(self) -> None:
        """End the connection; calls in flight fail with ``Closed``. Results stay valid. A second call does nothing."""
        self._exchange.close()
        if self._gpu is not None:
            self._gpu.close()

    @property
    def device_path(self) -> str:
        """How tensors get from this client's GPU to the server and back, in words.

        "on the GPU": they stay there. Otherwise why not, and they go through the pinned arenas; "no GPU" without one.

        Raises:
            Closed, PeerDied: The connection has ended.
        """
        return self._exchange.live().device_path

    @property
    def cuda_stream(self) -> Any:
        """The stream that tensors on the GPU are ready on, as cuda-core's, for programs that use it without torch.

        None if this client has no GPU.

        Raises:
            Closed, PeerDied: The connection has ended.
        """
        copies = self._exchange.live().memory.copies
        return None if copies is None else copies.stream

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@uncompiled
class CallOptions:
    """A client with other options for its calls; made by ``Client.with_options``."""

    def __init__(self, exchange: Exchange, timeout_s: float, retries: int, read_ahead: int) -> None:
        self._exchange = exchange
        self._timeout_s = timeout_s
        self._retries = retries
        self._read_ahead = read_ahead

    def call(self, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """As ``Client.call``, with these options."""
        for attempt in range(self._retries):
            try:
                return self._exchange.call(method, [(arguments, keywords)], self._timeout_s)
            except (PeerDied, Closed):  # noqa: PERF203
                self._restore(attempt)
        given = [(arguments, keywords)]
        del arguments, keywords  # as in ``Client.call``
        return self._exchange.call(method, given, self._timeout_s)

    def _restore(self, attempt: int) -> None:
        """Reconnect; pause if that failed in a way that may pass, twice as long each time."""
        try:
            self._exchange.restore()
        except (ConnectRefused, PeerDied):  # the server is stopping, or full
            time.sleep(min(_FIRST_PAUSE_S * 2 ** min(attempt, 10), _LONGEST_PAUSE_S))

    def submit(self, method: str, /, *arguments: Any, **keywords: Any) -> PendingReply:
        """As ``Client.submit``, with this ``timeout_s``."""
        call = self._exchange.begin(CallInFlight(method), arguments, keywords, self._timeout_s)
        return PendingReply(call, self._exchange)

    def send(self, method: str, /, *arguments: Any, **keywords: Any) -> None:
        """As ``Client.send``, with this ``timeout_s``."""
        self._exchange.send(method, arguments, keywords, self._timeout_s)

    def stream(self, method: str, /, *arguments: Any, **keywords: Any) -> ReplyStream:
        """As ``Client.stream``, with this ``read_ahead``, and ``timeout_s`` for each part."""
        call = self._exchange.begin(StreamInFlight(method, self._read_ahead), arguments, keywords, self._timeout_s)
        return ReplyStream(call, self._exchange, self._timeout_s)
