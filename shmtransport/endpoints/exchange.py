"""The calls of a blocking client: any thread sends, and one of those that wait receives for all.

``turns`` says which thread that is. Where no thread waits and a call is to be followed by a callback, a thread of the
exchange's own receives. Callbacks run after the lock is released, in the thread that received the reply.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..channels.backlog import QUEUE_LIMIT
from ..core import Counters
from ..cuda.gpu import Gpu
from ..errors import CallTimeout, Closed, DeviceError, OutOfResources, PeerDied, PeerProtocolError, TransportError
from ..protocol.in_flight import CallInFlight, OneWayCall, StreamInFlight
from ..protocol.messages import Cancel, encode
from ..protocol.uncompiled import uncompiled
from ..text import traceback_text
from .client_base import ConnectionState, full_error, timeout_error
from .client_connection import ClientConnection, Connecting
from .device_sharing import share_device
from .direct import direct_calls
from .options import seconds_or_no_limit
from .turns import Turns

logger = logging.getLogger("shmtransport")

CallT = TypeVar("CallT", bound=CallInFlight)

_WATCH_SLICE_S = 0.25  # how soon a dead server is noticed while waiting for a reply
_SEND_SLICE_S = 0.05  # how soon a full queue is tried again where nothing tells that it has room


@uncompiled
class Exchange(ConnectionState[ClientConnection]):
    """Sends calls and receives their replies, for all threads of one client.

    Args:
        connecting: Begins a new connection.
        timeout_s: How long a call may take unless it says otherwise, in seconds.
        counters: What the client has done.
        gpu: The client's. Default: it has none.
    """

    def __init__(
        self, connecting: Callable[[], Connecting], timeout_s: float, counters: Counters, gpu: Gpu | None = None
    ) -> None:
        super().__init__()
        self._gpu = gpu
        self._connecting = connecting
        self._timeout_s = timeout_s
        self._counters = counters
        self._generation = 0
        """How many connections there have been."""
        self._closed = False
        """Whether its user has closed it since then."""
        self._direct: Any = None
        """What calls directly over the live connection, if it can be done."""
        self._reset_threads()

    def _reset_threads(self) -> None:
        self.turns = Turns()
        self.lock = self.turns.lock
        self._lost = threading.local()
        """``generation``: that of the last connection whose loss this thread was told."""
        self._to_call_back: deque[CallInFlight] = deque()
        """Calls that have ended and have callbacks."""
        self._called_back: list[CallInFlight] = []
        """Calls with callbacks that had not ended when ``_receiver`` last looked."""
        self._receiver: threading.Thread | None = None
        self._untold: deque[bytes] = deque()
        """What the server is to be told about calls that were sent before, once there is room."""

    def connect(self) -> None:
        """Make the connection, or another one after ``close``.

        Raises:
            TransportError: as ``Client``.
        """
        self.connection = ClientConnection(self._connecting())
        self._direct = direct_calls(self.connection, self.turns, self._counters, self._to_call_back.append)
        self.ended = None
        self._closed = False
        self._untold.clear()
        self._generation += 1
        if self._gpu is not None:
            connection = self.connection
            connection.device_path = share_device(self._gpu, connection.memory, connection.sizes, self._call_plainly)

    def _call_plainly(self, method: str, *arguments: Any) -> Any:
        return self.call(method, [(arguments, {})], self._timeout_s)

    def reconnect(self) -> None:
        """End this connection and make another; threads that lost the same connection make one new one together.

        Raises:
            TransportError: as ``Client``; afterwards this may be tried again.
        """
        seen = self._generation
        lost = getattr(self._lost, "generation", seen)
        self._lost.generation = seen
        with self.lock:
            if self.ended is not None or self._generation <= min(seen, lost):
                self._close("the client reconnects")
                self._renew()
            self._lost.generation = self._generation

    def restore(self) -> None:
        """Reconnect if the connection was lost, unless another thread has.

        Raises:
            Closed: the client was closed.
            TransportError: as ``reconnect``.
        """
        with self.lock:
            if self.ended is not None and self._closed:
                raise Closed(*self.ended.args)
            self._renew()

    def close(self) -> None:
        """End the connection. A second call does nothing."""
        with self.lock:
            self._close("this client was closed")
            self._closed = True
        self._run_callbacks()

    def abandon(self) -> None:
        self._closed = True
        self._stop_direct()
        self._reset_threads()  # the lock may have been held by a thread that this process doesn't have
        super().abandon()

    def live(self) -> ClientConnection:
        generation = self._generation  # read first: another thread may be reconnecting
        if self.ended is None and self.connection is not None:
            return self.connection
        self._lost.generation = generation
        return super().live()

    def call(self, method: str, given: list[tuple[tuple[Any, ...], dict[str, Any]]], timeout_s: float) -> Any:
        """Make a call and wait for its result, for ``timeout_s`` seconds in all.

        Args:
            method: The name of the method.
            given: One item, the arguments and keywords; it is taken out, so that no frame keeps them meanwhile.
            timeout_s: How long that may take.
        """
        call = CallInFlight(method)
        call.generation = self._generation
        try:
            result = self._call_directly(call, given, timeout_s)
            if not call.handed_out:
                if given:
                    self._begin_by_steps(call, *given.pop(), timeout_s)
                self._wait_to_the_end(call, timeout_s)
            if self._to_call_back:
                self._run_callbacks()
            return result if call.handed_out else call.take_result()
        finally:
            del call  # an error's traceback keeps this frame

    def begin(self, call: CallT, arguments: Sequence[Any], keywords: Mapping[str, Any], timeout_s: float) -> CallT:
        """Send a call, and return it; waits for room for up to ``timeout_s`` seconds.

        Raises:
            TransportError: nothing was sent, and nothing is held for it.
        """
        direct = self._direct
        call.generation = self._generation
        if (
            direct is None
            or type(call) is not CallInFlight
            or self._untold
            or not direct.begin(call, arguments, keywords)
        ):
            self._begin_by_steps(call, arguments, keywords, timeout_s)
        return call

    def _begin_by_steps(
        self, call: CallInFlight, arguments: Sequence[Any], keywords: Mapping[str, Any], timeout_s: float
    ) -> None:
        """Send a call as ``begin`` does, where the core can't in one step."""
        connection = self.live()
        try:
            if timeout_s == self._timeout_s:
                data = connection.protocol.begin_call(call, arguments, keywords)
            else:
                with connection.memory.send_arena.claims_within(timeout_s):
                    data = connection.protocol.begin_call(call, arguments, keywords)
        except PeerDied as error:
            self._lost.generation = call.generation
            with self.lock:
                self._end(connection, error)
            raise
        except Closed:
            self.live()  # what another thread has ended it with
            raise
        with self.lock:
            try:
                self._start(connection, call, data, timeout_s)
            except BaseException:
                connection.protocol.take_back(call)
                raise
        call.data = None
        if self._to_call_back:
            self._run_callbacks()

    def send(self, method: str, arguments: Sequence[Any], keywords: Mapping[str, Any], timeout_s: float) -> None:
        """Send a call that is not answered; raises as ``begin``."""
        self.begin(OneWayCall(method), arguments, keywords, timeout_s)

    def wait_for(self, call: CallInFlight, timeout_s: float | None) -> None:
        """Wait until a call is ready; None for the client's time.

        Raises:
            CallTimeout: it is not; it stays in flight.
        """
        timeout_s = self._timeout_s if timeout_s is None else seconds_or_no_limit("timeout_s", timeout_s)
        self._wait(call, timeout_s, timeout_s)
        self._notice_loss(call)

    def receive_for(self, call: CallInFlight) -> None:
        """Receive what has arrived, without waiting; find out if the server is gone."""
        with self.lock:
            connection = self.connection
            if not call.ended and connection is not None and not self.turns.taken():
                self._receive_all(connection)
                if not call.ended and (error := connection.died()) is not None:
                    self._end(connection, error)
        self._run_callbacks()

    def give_up(self, call: CallInFlight, error: TransportError) -> bool:
        """End a call with an error; False if it has ended already."""
        with self.lock:
            if call.ended:
                return False
            connection = self.connection
            if connection is not None:
                connection.protocol.give_up(call, error)
                self._tell(connection, encode(Cancel(call.call_id)))
            self._answered(call)
        self._run_callbacks()
        return True

    def take_part(self, stream: StreamInFlight) -> Any:
        """Return the next part of a stream that is ready; raises as ``StreamInFlight.take_part``."""
        with self.lock:
            part = stream.take_part()
            more = stream.more()
            if more is not None and self.connection is not None:
                self._tell(self.connection, more)
        return part

    def call_back(self, call: CallInFlight, callback: Callable[[], object]) -> None:
        """Call ``callback`` once the call has ended; now if it has.

        Raises:
            OutOfResources: the thread that would receive its reply can't be started.
        """
        with self.lock:
            if not call.ended:
                if self._receiver is None:
                    self._start_receiver()
                if call.callbacks is None:
                    call.callbacks = []
                    self._called_back.append(call)
                call.callbacks.append(callback)
                return
        _run(callback)

    def _start_receiver(self) -> None:
        receiver = threading.Thread(target=self._receive_for_callbacks, name="shmtransport receiver", daemon=True)
        try:
            receiver.start()
        except RuntimeError as error:
            raise OutOfResources(f"callbacks need a thread: {error}") from error
        self._receiver = receiver

    def _receive_for_callbacks(self) -> None:
        """Receive for as long as a call with callbacks is in flight."""
        while True:
            with self.lock:
                self._called_back = [call for call in self._called_back if not call.ended]
                if not self._called_back:
                    self._receiver = None
                    break
                try:
                    self._step(self.live(), self._called_back[0], _WATCH_SLICE_S)
                except TransportError:
                    pass  # it has ended, and every call with it
                finally:
                    self.turns.hand_over()
            self._run_callbacks()
        self._run_callbacks()

    def _run_callbacks(self) -> None:
        while self._to_call_back:
            try:
                call = self._to_call_back.popleft()
            except IndexError:  # another thread was faster
                return
            for callback in call.callbacks or ():
                _run(callback)

    def _notice_loss(self, call: CallInFlight) -> None:
        """Remember that this thread is about to be told of a connection's loss, and of which one's."""
        if isinstance(call.error, PeerDied):
            self._lost.generation = call.generation

    def _wait(self, call: CallInFlight, left_s: float, timeout_s: float) -> None:
        """Wait until this call is ready or the server is dead, for ``left_s`` of the ``timeout_s`` that it has."""
        deadline = time.monotonic() + left_s
        if not self._wait_directly(call, left_s):
            with self.lock:
                try:
                    while not call.ready:
                        self._wait_in_turn(call, left_s, timeout_s)
                        left_s = deadline - time.monotonic()
                finally:
                    self.turns.hand_over()
        if self._to_call_back:
            self._run_callbacks()

    def _wait_to_the_end(self, call: CallInFlight, timeout_s: float) -> None:
        """Wait until this call has ended, with ``CallTimeout`` if its time is up."""
        if not call.ended:
            try:
                self._wait(call, timeout_s - (time.perf_counter() - call.submitted), timeout_s)
            except CallTimeout as error:
                self.give_up(call, error)
        self._notice_loss(call)

    def _call_directly(
        self, call: CallInFlight, given: list[tuple[tuple[Any, ...], dict[str, Any]]], timeout_s: float
    ) -> Any:
        """Make a call in one step, as far as that can be done.

        Returns:
            The result, if the call was handed out. Otherwise there is more to do: all of it, if ``given`` has its item.
        """
        connection, direct = self.connection, self._direct
        if connection is None or direct is None or self._untold:
            return None
        try:
            return direct.call(call, given, timeout_s)
        except PeerProtocolError as error:
            self._break(connection, direct, error)
        finally:
            if not call.handed_out and (direct is not self._direct or self.turns.followers):
                self._leave(connection)

    def _wait_directly(self, call: CallInFlight, left_s: float) -> bool:
        """Wait while no other thread does; whether the call is ready."""
        connection, direct = self.connection, self._direct
        if connection is None or direct is None:
            return call.ready
        try:
            direct.wait(call, left_s)
        except PeerProtocolError as error:
            self._break(connection, direct, error)
        finally:
            if direct is not self._direct or self.turns.followers:
                self._leave(connection)
        return call.ready

    def _break(self, connection: ClientConnection, direct: Any, error: PeerProtocolError) -> None:
        """End a connection whose server has broken the protocol, if it is still the one of these direct calls."""
        with self.lock:
            if direct is self._direct:
                connection.say_goodbye("protocol error")
                self._end(connection, error)

    def _leave(self, connection: ClientConnection) -> None:
        """Do what is left to a thread that has received: close what has ended meanwhile, let another thread receive."""
        with self.lock:
            ended = self.ended is not None and not self.turns.received_for
            if ended or connection is not self.connection:
                connection.close(flush=self.flush)
            self.turns.hand_over()

    def _stop_direct(self) -> None:
        direct, self._direct = self._direct, None
        if direct is not None:
            direct.close()

    # From here on, all with the lock held.

    def _wait_in_turn(self, call: CallInFlight, left_s: float, timeout_s: float) -> None:
        """Receive for all, or wait while another thread does, once."""
        connection = self.live()
        if self._untold:
            self._tell_all(connection)
        if left_s > 0:
            self._step(connection, call, left_s)
            return
        self._receive_all(connection)
        if not call.ready and self.ended is None:
            raise timeout_error(call, connection, timeout_s)

    def _renew(self) -> None:
        """Connect once no other thread uses the ended connection, unless another one has connected by then."""
        while self.ended is not None and self.turns.taken():
            self.turns.wait_for_receiver()
        if self.ended is not None:
            self.connect()

    def _start(self, connection: ClientConnection, call: CallInFlight, data: bytes, timeout_s: float) -> None:
        """Send a request; waits while the queue is full."""
        if self.live() is not connection:
            raise Closed("the client was reconnected while this request was being made")
        if not isinstance(call, OneWayCall):
            connection.protocol.expect_reply(call)
        if not self._send(connection, data):
            self._send_when_possible(connection, call, data, timeout_s)
        if self.turns.received_for:  # sending can consume the event that would have told the receiver of a reply
            self._receive_all(connection)

    def _send_when_possible(
        self, connection: ClientConnection, call: CallInFlight, data: bytes, timeout_s: float
    ) -> None:
        self._counters.count_stall()
        started = time.monotonic()
        try:
            while not self._send(connection, data):
                if time.perf_counter() - call.submitted >= timeout_s:
                    raise full_error(timeout_s)
                self._step(connection, call, _SEND_SLICE_S)
                self.live()
        finally:
            self._counters.count_stalled(time.monotonic() - started)
            self.turns.hand_over()

    def _tell(self, connection: ClientConnection, data: bytes) -> None:
        """Tell the server something about a call that was sent before: now, or as soon as there is room."""
        if self.ended is None:
            self._untold.append(data)
            self._tell_all(connection)

    def _tell_all(self, connection: ClientConnection) -> None:
        with contextlib.suppress(PeerProtocolError):  # which has ended the connection
            while self._untold and self._send(connection, self._untold[0]):
                self._untold.popleft()
        if self.turns.received_for:  # as in ``_start``
            self._receive_all(connection)

    def _send(self, connection: ClientConnection, data: bytes) -> bool:
        try:
            return connection.channel.send(data)
        except PeerProtocolError as error:
            self._end(connection, error)
            raise

    def _step(self, connection: ClientConnection, key: object, timeout_s: float) -> None:
        """Receive for all, or wait while another thread does."""
        if self.turns.taken():
            self.turns.follow(key, timeout_s)
        elif connection.channel.looks_first or not self._receive(connection):
            self._wait_as_receiver(connection, key, min(timeout_s, _WATCH_SLICE_S))

    def _wait_as_receiver(self, connection: ClientConnection, key: object, timeout_s: float) -> None:
        try:
            if self.turns.wait_as_receiver(key, connection.channel.wait, timeout_s):
                self._counters.count_wait()
        finally:
            current = connection is self.connection and self.ended is None
            if self.turns.received_for:  # the call that this one interrupted looks at once whether its reply has come
                connection.channel.wake()
            elif not current:  # what ended it has left the closing to this thread
                connection.close(flush=self.flush)
        if current and not self._receive(connection) and (error := connection.died()) is not None:
            self._receive_all(connection)  # the replies that it sent before
            self._end(connection, error)

    def _receive(self, connection: ClientConnection) -> bool:
        """Take the next message, if there is one."""
        try:
            data = connection.channel.receive()
            if data is None:
                return False
            completed = connection.protocol.take_reply(data)
        except (PeerDied, DeviceError) as error:
            self._end(connection, error)
        except PeerProtocolError as error:
            connection.say_goodbye("protocol error")
            self._end(connection, error)
        else:
            if completed is not None:
                self._answered(completed)
        return True

    def _answered(self, call: CallInFlight) -> None:
        """Wake the thread that waits for a call, and have its callbacks called."""
        if call.callbacks:
            self._to_call_back.append(call)
        if self.turns.call(call) and self.connection is not None:
            self.connection.channel.wake()  # the waiting thread is the receiver: nothing else may wake it

    def _receive_all(self, connection: ClientConnection) -> None:
        for _ in range(QUEUE_LIMIT):  # a server that sends without end must not keep this thread
            if self.ended is not None or not self._receive(connection):
                return

    def _close(self, reason: str) -> None:
        connection = self.connection
        if self.ended is None and connection is not None:
            connection.say_goodbye(reason)
            self._end(connection, Closed(reason))

    def _end(self, connection: ClientConnection, error: TransportError) -> None:
        """End this connection for good, with what every later use of it will raise."""
        if self.ended is not None or self.connection is not connection:
            return
        self.ended = error
        self._stop_direct()
        self._to_call_back.extend(call for call in connection.protocol.fail_all(error) if call.callbacks)
        self.turns.call_all()
        if self.turns.received_for:
            connection.channel.wake()
        else:
            connection.close(flush=self.flush)


def _run(callback: Callable[[], object]) -> None:
    """Run a callback, and log what it raises."""
    try:
        callback()
    except Exception as error:  # noqa: BLE001 - a user's function may raise anything
        logger.error("a callback of a call raised\n%s", traceback_text(error))
