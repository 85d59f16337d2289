"""The blocking server: one thread, many clients, each with its own pair of segments."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

from .errors import Closed
from .host import Host
from .hosted import Arrival

_LOOK_INTERVAL_S = 0.25
_CLOSE_GRACE_S = 5.0  # for the call that another thread is handling, beside the time to drain
_ASK_INTERVAL_S = 0.5  # for clients whose process the kernel does not show to this one, as in another container


class Server(Host):
    """Answers calls at ``address`` with registered handlers, one at a time.

    ``max_arena_bytes`` bounds both arenas of one client together, ``max_total_arena_bytes`` those of all clients
    (default: half of what /dev/shm has), ``max_clients`` their number, ``max_message_bytes`` the plain values of a
    call or result. Sizes in bytes. ``channels`` are those that clients may use: a server whose clients don't trust
    each other offers "zmq" alone, see docs/security.md. With ``spin_us`` it looks for so long for messages of doorbell
    clients before it blocks, which keeps a core busy. ``claim_timeout_s`` is how long a handler's ``empty``, or the
    copying of a result, waits for the caller to release something; nobody else is served meanwhile.
    ``drain_timeout_s`` is how long requests that have come already are still answered after ``stop``; None: no limit.
    With ``prefault`` all pages of a client's arenas are mapped when it connects.

    A forked child can't use it, and does nothing to it by exiting.

    Raises:
        AddressError: the address is malformed, not on this machine, or already served.
    """

    _serving_thread: int | None = None
    _close_when_served = False

    def serve(self) -> None:
        """Answer calls until ``stop``; in the main thread SIGINT and SIGTERM stop it too, after the current call.

        Raises:
            Closed: the server was closed, or this process was forked from the one that made it.
            SystemExit, KeyboardInterrupt: a handler raised it, as ``sys.exit`` does; its caller gets no reply.
        """
        self._check_usable()
        self._serving_thread = threading.get_ident()
        self._served.clear()
        try:
            with self._stopped_by_signals():
                self._serve_until_stopped()
        finally:
            self._serving_thread = None
            self._served.set()
            if self._close_when_served:
                self._close()

    def close(self) -> None:
        """End all connections and remove the socket. A second call does nothing.

        While ``serve`` runs this stops it first: in a handler it returns at once, and ``serve`` closes the server when
        it has answered what has come; another thread waits for that.
        """
        if self._serving_thread is None:
            self._close()
            return
        self._close_when_served = True
        self.stop()
        if self._serving_thread != threading.get_ident():
            self._served.wait(self._drain_timeout_s + _CLOSE_GRACE_S)

    def abandon(self) -> None:
        super().abandon()
        self._serving_thread = None
        self._close_when_served = False

    def _close(self) -> None:
        self._at_drop.detach()
        self._drop_all()
        self._channel.close()
        self._ended = self._ended or Closed("this server was closed")

    def _serve_until_stopped(self) -> None:
        looked = time.monotonic()
        while not self._stopping.is_set():
            if not self._serve_one():
                self._idle()
            elif time.monotonic() - looked > _LOOK_INTERVAL_S:  # without a pause in the work: who has ended?
                looked = time.monotonic()
                self._drop_ended(self._channel.wait(0))
        # Then answer what has come already.
        deadline = time.monotonic() + self._drain_timeout_s
        while time.monotonic() < deadline and self._serve_one():
            pass

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _serve_one(self) -> bool:
        """Take one message and answer it; whether there was one.

        By the time the reply is sent, neither arguments nor result are held here any more: whoever has the reply may
        count on the room that they took.
        """
        received = self._receive()
        if not isinstance(received, Arrival):
            return received
        client, data = received.client, self._answer(received)
        del received
        self._reply(client, data)
        del client  # whoever keeps the traceback of a handler's error keeps this frame
        return True

    def _answer(self, arrival: Arrival) -> bytes:
        """Handle a call; the bytes of its reply."""
        client, call = arrival.client, arrival.call
        self._counters.in_flight_peak = 1
        started = time.perf_counter()
        token = self._current.set(client.reference)
        try:
            return client.protocol.reply(call.call_id, self._handler(call)(*call.arguments, **call.keywords))
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - whatever else a handler raises is its caller's to know
            return self._failure(client, call, error)
        finally:
            self._current.reset(token)
            self._counters.count_call(time.perf_counter() - started)
            del arrival, call, client  # as in ``_serve_one``

    def _idle(self) -> None:
        """Nothing to answer: block until there is, or a client's process ends."""
        self._drop_ended(self._channel.wait(_ASK_INTERVAL_S if self._unwatched else None))
        if self._unwatched:
            self._ask_unwatched()

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(_number: int, _frame: FrameType | None) -> None:
            self.stop()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        # A signal that comes just before the poll blocks would otherwise be handled only when the poll returns.
        previous_fd = signal.set_wakeup_fd(self._channel.wake_descriptor, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
