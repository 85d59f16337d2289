"""The blocking server: one thread, many clients, each with its own pair of segments."""

from __future__ import annotations

import contextlib
import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

import torch

from ..channels.doorbell_server import ThreadDoorbells
from ..errors import Closed, LocalProtocolError, PeerProtocolError
from ..memory.send_arena import FIRST_PAUSE_S, LONGEST_PAUSE_S
from ..protocol.calls import Call
from ..protocol.messages import CHANNEL_KINDS, DEFAULT_MAX_MESSAGE_BYTES, MAX_WINDOW, ChannelKind, More
from .connection_memory import ASK_INTERVAL_S
from .deferred import Deferred, DeferredReplies, encoded
from .direct import DirectServing
from .executors import Executor, InlineExecutor, Job, Outcome, PoolExecutor
from .options import DEFAULT_MAX_ARENA_BYTES, ServerOptions
from .server_base import ServerBase
from .server_connection import IncomingCall, ServerConnection
from .server_stream import ServerStream, check_number

_LOOK_INTERVAL_S = 0.25
_STREAMS_END_S = 1.0  # how long generators may take, when the server is closed, to end
_CLOSE_GRACE_S = 5.0  # for the call that another thread is handling, on top of the time to drain


class Server(ServerBase[ThreadDoorbells]):
    """Answers calls at ``address`` with registered handlers.

    A handler that is a generator answers ``Client.stream``: it runs up to the next ``yield`` as the client takes what
    it has yielded. If a client keeps so many results that the next has no room, that reply alone waits for room.

    A forked child can't use it, and does nothing to it by exiting.

    Args:
        address: Where to listen: ``ipc:///absolute/path``, or ``tcp://`` with a loopback address.
        max_arena_bytes: The most that both arenas of one client may have together, in bytes.
        max_total_arena_bytes: The most that the arenas of all clients may have, in bytes; None for half of /dev/shm.
        max_clients: How many clients may be connected at once.
        max_message_bytes: The largest message: a call's or result's plain values.
        channels: The channels that clients may use.
        spin_us: How long to poll for messages of doorbell clients before blocking, in microseconds. It keeps a core
            busy for as long. None: for up to 50 where messages have been coming as fast as that, else not at all.
        claim_timeout_s: How long a handler's ``empty``, or the copying of a result, waits for the caller to release
            something, before ``empty`` takes other memory and a reply is put off. With one thread, no other client
            is served in that time.
        drain_timeout_s: How long requests that had arrived are still answered after ``stop``; None for no limit.
        prefault: Map all pages of a client's arenas when it connects, rather than on first use.
        threads: How many handlers may run at the same time, each for another client: calls of one client are handled
            one at a time, in order. With 1 handlers run in the thread that calls ``serve``.
        device: The GPU that handlers compute on, such as "cuda:0". Arenas are pinned for it, see ``to_device``; a
            tensor on it that a handler returns is copied to the reply arena while others are served.
        debug: Send the traceback of what a handler raises to its caller. It shows this program's files.

    Raises:
        AddressError: The address is malformed, not on this machine, or already served.
        LocalProtocolError: An option is wrong.
        SegmentError, OutOfResources: There is no /dev/shm, or file descriptors are short.
        DeviceError: There is no such GPU, or no driver for it.
    """

    def __init__(
        self,
        address: str,
        *,
        max_arena_bytes: int = DEFAULT_MAX_ARENA_BYTES,
        max_total_arena_bytes: int | None = None,
        max_clients: int = 64,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        channels: Sequence[ChannelKind] = CHANNEL_KINDS,
        spin_us: float | None = None,
        claim_timeout_s: float = 0.0,
        drain_timeout_s: float | None = 5.0,
        prefault: bool = False,
        threads: int = 1,
        device: str | torch.device | None = None,
        debug: bool = False,
    ) -> None:
        options = ServerOptions.checked(
            max_arena_bytes=max_arena_bytes,
            max_total_arena_bytes=max_total_arena_bytes,
            max_clients=max_clients,
            max_message_bytes=max_message_bytes,
            channels=channels,
            spin_us=spin_us,
            claim_timeout_s=claim_timeout_s,
            drain_timeout_s=drain_timeout_s,
            prefault=prefault,
            threads=threads,
            device=device,
            debug=debug,
        )
        self._direct: DirectServing | None = None
        super().__init__(address, options, ThreadDoorbells)
        if options.threads == 1:
            self._direct = DirectServing(self._doorbells, self._handlers.by_name, self._counters, self._current)
        self._serving_thread: int | None = None
        self._served = threading.Event()
        self._close_when_served = False
        self._deferred = DeferredReplies(self._counters, self._answer_deferred, self._fail_deferred)
        self._executor: Executor = (
            InlineExecutor(self._perform, self._finish)
            if options.threads == 1
            else PoolExecutor(self._perform, self._finish, options.threads, self._zmq.wake)
        )

    def register(self, name: str, handler: Callable[..., Any]) -> None:
        if inspect.iscoroutinefunction(handler):
            raise LocalProtocolError(f"the handler for {name!r} is a coroutine function: use AsyncServer for it")
        if inspect.isasyncgenfunction(handler):
            raise LocalProtocolError(f"the handler for {name!r} is an async generator: use AsyncServer for it")
        super().register(name, handler)

    def serve(self) -> None:
        """Answer calls until ``stop``; in the main thread SIGINT and SIGTERM stop it too.

        Raises:
            Closed: the server was closed, or this process was forked from the one that made it.
            SystemExit, KeyboardInterrupt: A handler raised it, for example by ``sys.exit``; its caller gets no reply.
        """
        self._check_usable()
        self._serving_thread = threading.get_ident()
        self._served.clear()
        try:
            with self._stopped_by_signals():
                self._serve_until_stopped()
        finally:
            self._serving_thread = None
            try:
                if self._close_when_served:
                    self._close()
            finally:
                self._served.set()

    def close(self) -> None:
        """End all connections and remove the socket. A second call does nothing.

        While ``serve`` runs, this stops it first. In a handler it returns at once, and ``serve`` closes the server once
        it has answered what has arrived; in another thread it waits for that.
        """
        if self._serving_thread is None:
            self._close()
            return
        self._close_when_served = True
        self.stop()
        if self._serving_thread != threading.get_ident() and self._current.get(None) is None:
            self._served.wait(self._options.drain_timeout_s + _CLOSE_GRACE_S)

    def abandon(self) -> None:
        if self._direct is not None:
            self._direct.abandon()
        super().abandon()
        self._serving_thread = None
        self._close_when_served = False

    def _close(self) -> None:
        self._at_drop.detach()
        self._drop_all()
        deadline = time.monotonic() + _STREAMS_END_S
        while self._executor.step() or (self._executor.busy and time.monotonic() < deadline):
            if self._executor.busy:
                time.sleep(FIRST_PAUSE_S)
        self._executor.close()
        self._give_back()
        self._ended = self._ended or Closed("this server was closed")

    def _serve_until_stopped(self) -> None:
        looked = time.monotonic()
        while not self._stopping:
            if not self._serve_one():
                if not self._stopping:  # a handler may have stopped it, or be in a forked child
                    self._idle()
            elif time.monotonic() - looked > _LOOK_INTERVAL_S:  # without a pause in the work: has a client ended?
                looked = time.monotonic()
                self._drop_ended(self._channel.wait(0))
        # Then answer what has arrived.
        deadline = time.monotonic() + self._options.drain_timeout_s
        while time.monotonic() < deadline:
            if not self._serve_one():
                if not self._executor.busy and not self._deferred:
                    break
                self._drop_ended(self._channel.wait(LONGEST_PAUSE_S))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _serve_one(self) -> bool:
        """Take one message and answer it if it is a call, go on with other work; return whether there was any."""
        answered = self._answer_directly()
        if answered and self._stopping:
            return True  # requests that have arrived are answered for a limited time: it is looked at between them
        received = self._receive()
        if isinstance(received, IncomingCall):
            self._begin(received)
            received = True
        worked = self._executor.step() or received or answered
        return self._deferred.retry() or worked

    def _answer_directly(self) -> bool:
        """Answer plain calls of doorbell clients while nothing else is to be done; return whether there were any."""
        if self._direct is None or not self._direct.has_doorbells or self._executor.busy or self._deferred:
            return False
        answered = self._direct.answer()
        if isinstance(answered, bool):
            return answered
        connection, rest = answered
        left = [rest]
        del answered, rest  # this process holds the result no longer than its reply is made
        self._finish_directly(connection, left)
        return True

    def _answer_message(self, connection: ServerConnection, messages: list[bytes]) -> bool:
        if self._direct is None or self._executor.busy or self._deferred:
            return False
        left = [self._direct.answer_message(connection, messages)]
        if left[0] is None:
            return False
        if left[0] is not True:
            self._finish_directly(connection, left)
        return True

    def _finish_directly(self, connection: ServerConnection, left: list[Any]) -> None:
        """Do what the core has left of a call; it is taken out, so that no frame keeps a result any longer."""
        if isinstance(left[0], tuple):
            self._finish_call(connection, left)
            return
        rest = left.pop()
        if isinstance(rest, bytes):
            self._reply(connection, rest)
        elif isinstance(rest, PeerProtocolError):
            self._refuse(connection, rest)
        else:
            raise rest

    def _finish_call(
        self, connection: ServerConnection, box: list[tuple[int, str, Any, BaseException | None, float]]
    ) -> None:
        """Answer a call whose handler has returned or raised: see ``DirectServing.answer``."""
        call_id, method, result, error, started = box.pop()
        outcome: Outcome
        token = self._current.set(connection.reference)
        try:
            if error is not None:
                raise error
            outcome = encoded(connection, call_id, result)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as failed:  # noqa: BLE001 - as in ``_answer``
            outcome = self._failure(connection, call_id, method, failed)
        finally:
            self._current.reset(token)
            self._counters.count_call(time.perf_counter() - started)
            del result, error  # its traceback keeps this frame
        self._finish(IncomingCall(connection, call_id, True, 0, []), outcome)

    def _begin(self, incoming: IncomingCall) -> None:
        try:
            self._executor.add(incoming)
        except LocalProtocolError as error:
            connection, call = incoming.connection, incoming.take()
            self._counters.count_call(0.0)
            self._reply(connection, self._failure(connection, call.call_id, call.method, error, call.is_answered))

    def _perform(self, job: Job) -> Outcome:
        """Run a handler, in whichever thread, and return what is to become of it.

        When the reply is sent, this process no longer holds arguments or result: the caller counts on their room.
        """
        token = self._current.set(job.connection.reference)
        try:
            if isinstance(job, ServerStream):
                return self._advance(job)
            return self._answer(job.connection, job.take())
        except (SystemExit, KeyboardInterrupt) as error:
            return error
        finally:
            self._current.reset(token)

    def _answer(self, connection: ServerConnection, call: Call) -> Outcome:
        """Handle a call."""
        self._counters.count_in_flight(1)
        started = time.perf_counter()
        try:
            if call.window:
                check_number(connection)
            result = self._handlers.find(call.method, self)(*call.arguments, **call.keywords)
            if not call.is_answered:
                return None
            if call.window:
                return ServerStream(connection, call.call_id, call.method, result, call.window)
            return encoded(connection, call.call_id, result)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - a handler may raise anything; its caller learns of it
            return self._failure(connection, call.call_id, call.method, error, call.is_answered)
        finally:
            self._counters.count_call(time.perf_counter() - started)
            del call, connection  # a traceback that is kept, of a handler's error, keeps this frame

    def _advance(self, stream: ServerStream) -> Outcome:
        """Let a stream's handler make its next part."""
        connection = stream.connection
        try:
            if stream.cancelled:
                stream.close()
                return None
            return encoded(connection, stream.call_id, stream.take_turn(), is_part=True)
        except StopIteration:
            return connection.protocol.encode_reply(stream.call_id, None)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - as in ``_answer``
            failure = self._failure(connection, stream.call_id, stream.method, error, not stream.cancelled)
            stream.cancelled = not stream.ended  # its part can't be sent: it is closed in its next turn
            return failure
        finally:
            del connection

    # From here on in the serving thread.

    def _finish(self, job: Job, outcome: Outcome) -> None:
        """Send a reply, or go on with a call that has not ended."""
        connection = job.connection
        if isinstance(outcome, BaseException):
            raise outcome
        if isinstance(outcome, bytes):
            self._reply(connection, outcome)
        elif isinstance(outcome, Deferred):
            if isinstance(job, ServerStream):
                job.waits_for_room = True
            if connection.gone or job.cancelled:
                outcome.withdraw()
            else:
                self._deferred.add(outcome)
        elif isinstance(outcome, ServerStream):
            outcome.cancelled = isinstance(job, IncomingCall) and job.cancelled
            self._begin_stream(outcome)
        if isinstance(job, ServerStream):
            job.is_queued = False
            self._continue(job)

    def _begin_stream(self, stream: ServerStream) -> None:
        connection = stream.connection
        replaced = connection.streams.pop(stream.call_id, None)
        if replaced is not None:  # a client's own fault: it gave two calls the same number
            self._give_up(replaced)
        connection.streams[stream.call_id] = stream
        stream.cancelled = stream.cancelled or connection.gone
        self._continue(stream)

    def _continue(self, stream: ServerStream) -> None:
        """Give a stream its next turn if it wants one; forget it if it has ended."""
        if stream.ended:
            if stream.connection.streams.get(stream.call_id) is stream:
                del stream.connection.streams[stream.call_id]
        elif stream.wants_turn:
            stream.is_queued = True
            self._executor.add(stream)

    def _give_up(self, stream: ServerStream) -> None:
        stream.cancelled = True
        self._continue(stream)

    def _grant(self, connection: ServerConnection, more: More) -> None:
        stream = connection.streams.get(more.call_id)
        if stream is not None:
            stream.credit = min(stream.credit + more.count, MAX_WINDOW)
            self._continue(stream)

    def _cancel(self, connection: ServerConnection, call_id: int) -> None:
        self._executor.cancel(connection, call_id)
        self._deferred.drop(connection, call_id)
        stream = connection.streams.get(call_id)
        if stream is not None:
            self._give_up(stream)

    def _connect(self, connection: ServerConnection) -> None:
        super()._connect(connection)
        if self._direct is not None:
            self._direct.add(connection)

    def _heard(self, connection: ServerConnection) -> None:
        if self._direct is not None:
            self._direct.hear(connection)

    def _end_streams(self, connection: ServerConnection) -> None:
        if self._direct is not None:
            self._direct.remove(connection)
        self._executor.forget(connection)
        self._deferred.drop(connection)
        for stream in list(connection.streams.values()):
            self._give_up(stream)

    def _answer_deferred(self, deferred: Deferred, data: bytes) -> None:
        self._reply(deferred.connection, data)
        self._has_room(deferred)

    def _fail_deferred(self, deferred: Deferred, error: BaseException) -> None:
        connection = deferred.connection
        self._reply(connection, self._failure(connection, deferred.call_id, "a reply", error))
        stream = connection.streams.get(deferred.call_id)
        if stream is not None:
            stream.cancelled = True
        self._has_room(deferred)

    def _has_room(self, deferred: Deferred) -> None:
        stream = deferred.connection.streams.get(deferred.call_id)
        if stream is not None:
            stream.waits_for_room = False
            self._continue(stream)

    def _idle(self) -> None:
        """Block until a message arrives, a handler has ended or a client's process has; not for long while replies
        wait for room.
        """
        timeout_s = self._deferred.pause_s() if self._deferred else ASK_INTERVAL_S if self._unwatched else None
        self._drop_ended(self._channel.wait(timeout_s))
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
        previous_fd = signal.set_wakeup_fd(self._zmq.wake_descriptor, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
