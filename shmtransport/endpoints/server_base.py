"""What both servers share: handlers, clients, and the dispatch of received messages."""

from __future__ import annotations

import logging
import os
import time
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Generic, TypeVar, overload

import torch

from ..channels import address as addresses
from ..channels.base import BrokenPeer, ServerChannel
from ..channels.doorbell_server import DoorbellServerChannel
from ..channels.zmq import ZmqServerChannel
from ..core import CORE, Counters
from ..cuda.copies import copies_for
from ..cuda.gpu import Gpu
from ..errors import (
    ArenaFull,
    Closed,
    DeviceError,
    LocalProtocolError,
    OutOfResources,
    PeerProtocolError,
    TransportError,
)
from ..memory import leftovers
from ..memory.dtypes import AnyDType
from ..memory.forks import BoundToProcess, forked
from ..memory.opening import reason
from ..memory.ownership import registry
from ..memory.plain import row_of, sizes_of
from ..protocol.calls import Call
from ..protocol.messages import Cancel, Goodbye, Message, More, Refused, encode, shorten
from ..protocol.uncompiled import uncompiled
from ..statistics import Statistics
from ..text import forget_frames, printable, traceback_text
from ..units import size_text
from ..version import VERSION
from .connection_memory import tensor_on_device
from .device_sharing import NO_GPU, Rendezvous
from .handlers import Handlers
from .handshake import Admission, Admitted
from .options import ServerOptions, cuda_device, patience_of
from .server_connection import IncomingCall, ServerConnection, drop_all, remove_names_at_exit

logger = logging.getLogger("shmtransport")

_MOST_TO_REFUSE = 64
_LOOK_INTERVAL_S = 1.0

Handler = TypeVar("Handler", bound=Callable[..., Any])
DoorbellsT = TypeVar("DoorbellsT", bound=DoorbellServerChannel)


@uncompiled
class ServerBase(BoundToProcess, Generic[DoorbellsT]):
    """Base of both servers, which bring their classes of doorbell channel; see ``Server``."""

    def __init__(self, address: str, options: ServerOptions, doorbells: type[DoorbellsT]) -> None:
        self.address = address
        self.scheme = addresses.scheme_of(address)
        self._options = options
        self._handlers = Handlers()
        self._on_disconnect: list[Callable[[int], None]] = []
        self._counters = Counters()
        self._connections: dict[bytes, ServerConnection] = {}
        self._watched: dict[int, ServerConnection] = {}
        self._unwatched: set[ServerConnection] = set()
        self._next_look = 0.0
        """When to look again for clients that have left."""
        self._connected = 0
        self._last_refused = b""
        self._to_refuse: deque[tuple[bytes, bytes, int | None]] = deque()
        # Weak, since a task that a handler starts keeps a copy of it for as long as it runs.
        self._current: ContextVar[weakref.ref[ServerConnection]] = ContextVar("current client")
        # No Event: a signal that comes while another one's handler sets it would wait for the lock that this one holds.
        self._stopping = False
        self._made = time.monotonic()
        self._ended: Closed | None = None
        self._gpu, self._new_copies, self._rendezvous = None, None, None
        if options.device is not None:
            self._gpu = Gpu(options.device)
            self._new_copies = copies_for(self._gpu)
            self._rendezvous = Rendezvous(self._gpu, options.max_total_arena_bytes, options.max_clients)
        self._zmq = ZmqServerChannel(address, options.max_message_bytes)
        self._doorbells = doorbells(self._zmq, patience_of(options.spin_us))
        self._channel: ServerChannel = self._zmq  # the doorbells while a client uses them
        self._admission = Admission(options, self._counters, self._doorbells.prepare, self._new_copies)
        self._at_drop = weakref.finalize(self, drop_all, self._doorbells, self._connections, address)
        self._at_drop.atexit = False  # other threads may still serve; names are removed, and the kernel does the rest
        remove_names_at_exit(self._doorbells)
        registry.abandon_after_fork(self)
        leftovers.sweep()

    @overload
    def method(self, handler: Handler, /) -> Handler: ...

    @overload
    def method(self, name: str, /) -> Callable[[Handler], Handler]: ...

    def method(self, handler_or_name: Handler | str, /) -> Handler | Callable[[Handler], Handler]:
        """Register the decorated function, by its own name or by another: ``@server.method("name")``.

        Raises:
            LocalProtocolError: As ``register``.
        """
        if not isinstance(handler_or_name, str):
            self.register(handler_or_name.__name__, handler_or_name)
            return handler_or_name
        name = handler_or_name

        def register(handler: Handler) -> Handler:
            self.register(name, handler)
            return handler

        return register

    def register(self, name: str, handler: Callable[..., Any]) -> None:
        """Let clients call ``handler`` as ``name``. Tensors reach it as borrowed views of the client's arena.

        Raises:
            LocalProtocolError: the name is taken, is not a str, or starts with "__" as those do that every server
                answers; or the handler can't be called.
        """
        self._handlers.add(name, handler)

    def on_disconnect(self, callback: Callable[[int], None]) -> None:
        """Call ``callback(connection_id)`` whenever a client has gone, whatever the reason."""
        self._on_disconnect.append(callback)

    @property
    def connection_id(self) -> int:
        """The number of the connection that the running handler serves; never reused.

        Raises:
            LocalProtocolError: called outside a handler.
            Closed: the server was closed, or this is a forked child.
        """
        return self._caller().connection_id

    def empty(
        self, shape: int | Sequence[int], dtype: AnyDType, device: str | torch.device | None = None
    ) -> torch.Tensor:
        """Lend the running handler an uninitialised tensor in its caller's reply arena; returned, it is not copied.

        While the caller holds so many results that there is no room, the tensor is one of the server's own memory: it
        is copied in when there is.

        Args:
            shape: The size of each dimension, or of the only one.
            dtype: The element type: torch's, numpy's, or the name of one.
            device: "cuda" or "cuda:N" for one on the server's GPU: in its caller's arena there if both share one,
                otherwise in other memory, from which it is copied.

        Raises:
            TensorTooLarge: it exceeds the whole arena. If the handler raises this, so does the caller's call.
            ArenaFull: the handler itself holds so much that there is no room.
            LocalProtocolError: called outside a handler, or such a tensor can't be sent.
            Closed: the server was closed, or this is a forked child.
            DeviceError, MemoryError: the GPU has failed, or has too little memory.
        """
        if device is not None and (ordinal := cuda_device("device", device)) is not None:
            return tensor_on_device(self._caller().memory, self._options.device, ordinal, shape, dtype)
        reference = self._current.get(None)
        connection = None if reference is None or self._ended is not None else reference()
        if connection is None:
            connection = self._caller()  # which says what is wrong
        try:
            if not connection.deferred:  # otherwise the room is for those that wait
                return connection.lend(shape, dtype)
        except ArenaFull:
            if not connection.may_have_room:
                raise
        return torch.empty(sizes_of(shape), dtype=row_of(dtype).torch)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Lend a tensor with the shape and dtype of another one; see ``empty``."""
        return self.empty(tensor.shape, tensor.dtype)

    def to_device(self, tensor: torch.Tensor) -> Any:
        """Begin to copy an argument of the running handler to the server's GPU, and return the copy.

        It does not wait: what the handler then does on its current stream comes after the copy, and the argument is
        released when the copy is complete. From a pinned arena it is copied directly; see ``device_path``.

        Returns:
            A tensor on the GPU, torch's, or a ``CudaTensor`` where torch is built without CUDA; the tensor itself if
            it is there already, or the server has no GPU.

        Raises:
            LocalProtocolError: called outside a handler, or this is no CPU tensor.
            DeviceError: the GPU has failed.
            MemoryError: it has too little memory.
        """
        copies = self._caller().memory.copies
        if copies is None or copies.find(tensor) is not None:
            return tensor
        if not (isinstance(tensor, torch.Tensor) and tensor.is_cpu):
            raise LocalProtocolError("to_device takes a CPU tensor, such as an argument of the call")
        return copies.to_device(tensor.contiguous(), row_of(tensor.dtype))

    @property
    def cuda_stream(self) -> Any:
        """The stream of copies for the running handler's client, as cuda-core's; None if the server has no GPU.

        A handler that works on the GPU by other means than torch works on this stream, or lets its own wait for it.

        Raises:
            LocalProtocolError: called outside a handler.
        """
        copies = self._caller().memory.copies
        return None if copies is None else copies.stream

    @property
    def device_path(self) -> str:
        """How tensors get to the server's GPU, in words.

        "pinned": straight from and to all arenas; otherwise why some go through a buffer, "no client" while none is
        connected, and "no GPU" if the server has none.
        """
        if self._gpu is None:
            return NO_GPU
        paths = {one.memory.copies.path for one in self._connections.values() if one.memory.copies is not None}
        return "; ".join(sorted(paths)) or "no client"

    def offer_device(self) -> dict[str, Any]:
        """Tell a client which GPU this server uses, and where to bring memory on it; see ``device_sharing``.

        Raises:
            DeviceError: it uses none.
        """
        if self._rendezvous is None:
            raise DeviceError("the server has no GPU")
        return self._rendezvous.offer()

    def share_device(self, secret: bytes, cells: int) -> int:
        """Share memory on the GPU with the running handler's client; see ``Rendezvous.share``."""
        if self._rendezvous is None:
            raise DeviceError("the server has no GPU")
        connection = self._caller()
        return self._rendezvous.share(connection.memory, connection.sizes, secret, cells)

    def use_device(self) -> None:
        """Send tensors on the GPU to the running handler's client from now on, which has opened the memory there."""
        copies = self._caller().memory.copies
        if copies is not None:
            copies.use_arena()

    def statistics(self) -> Statistics:
        """Return totals over all clients since this server was made."""
        waits = self._counters.waits + self._zmq.waits + self._doorbells.waits
        found = replace(Statistics.of(self._counters), waits=waits)
        if self._gpu is None:
            return found
        return replace(found, pinned_copies=self._gpu.pinned_copies, bounced_copies=self._gpu.bounced_copies)

    def methods(self) -> list[str]:
        """Return the names of the methods that clients may call, sorted; for a client, ``Client.methods``."""
        return self._handlers.names()

    def health(self) -> dict[str, Any]:
        """Return what an operator asks first; for a client, ``Client.health``.

        Returns:
            The server's process id (``pid``), the package's ``version``, the ``core`` in use, how many ``clients`` are
            connected, how many ``calls`` were made and how many of them were ``failures``, how tensors get to its
            GPU (``device``, see ``device_path``), and its age in seconds (``uptime_s``).
        """
        return {
            "pid": os.getpid(),
            "version": VERSION,
            "core": CORE,
            "clients": len(self._connections),
            "calls": self._counters.calls,
            "failures": self._counters.failures,
            "device": self.device_path,
            "uptime_s": time.monotonic() - self._made,
        }

    def __repr__(self) -> str:
        state = f"{len(self._connections)} clients" if self._ended is None else f"ended ({self._ended})"
        return f"<{type(self).__name__} at {self.address}, {CORE} core: {state}, {self._counters.calls} calls>"

    def stop(self) -> None:
        """Make ``serve`` return; any thread, handler or signal handler may call it."""
        self._stopping = True
        self._zmq.wake()

    def abandon(self) -> None:
        """Give up the server in a forked child, without touching the parent's."""
        self._at_drop.detach()
        self._ended = forked("the server")
        self._doorbells.abandon()
        for connection in self._connections.values():
            connection.gone = True
            connection.memory.abandon()
        self._connections.clear()
        self._watched.clear()
        self._unwatched.clear()
        self._stopping = True

    def _drop_all(self) -> None:
        """End all connections."""
        for connection in list(self._connections.values()):
            self._send(connection.client_key, Goodbye("the server was shut down"))
            self._drop(connection, "server shut down")

    def _give_back(self) -> None:
        """Give back what belongs to no single client."""
        self._doorbells.close()
        if self._rendezvous is not None:
            self._rendezvous.close()
        if self._gpu is not None:
            self._gpu.close()

    def _check_usable(self) -> None:
        """Check that this server is open and belongs to this process.

        Raises:
            Closed: it is closed, or belongs to the parent.
        """
        if self._ended is not None:
            raise Closed(*self._ended.args)

    def _caller(self) -> ServerConnection:
        self._check_usable()
        reference = self._current.get(None)
        connection = None if reference is None else reference()
        if connection is None:
            raise LocalProtocolError("this is known only inside a handler")
        return connection

    def _receive(self) -> IncomingCall | bool:
        """Take the next message: the call that it makes, or else whether there was a message at all."""
        try:
            received = self._channel.receive()
        except BrokenPeer as broken:
            self._refuse(self._connections[broken.client_key], broken.error)
            return True
        if received is None:
            return self._look_round()
        client_key, data = received
        connection = self._connections.get(client_key)
        if connection is None:
            self._admit(client_key, data, self._channel.sender_pid)
            return True
        if not connection.heard:  # the client has mapped this side's segment
            connection.heard = True
            connection.memory.unlink_own()
            self._heard(connection)
        messages = [data]
        del received, data  # which a handler need not hold
        return self._answer_message(connection, messages) or self._take(connection, messages.pop())

    def _take(self, connection: ServerConnection, data: bytes) -> IncomingCall | bool:
        """Read a client's message: the call that it makes, or else True."""
        try:
            call = connection.protocol.take_request(data)
        except PeerProtocolError as error:
            self._refuse(connection, error)
            return True
        except DeviceError as error:  # a tensor on the GPU can't be borrowed any more
            logger.warning("client %d can't be served: %s", connection.connection_id, error)
            self._send(connection.client_key, Goodbye(shorten(str(error))))
            self._drop(connection, "the GPU has failed")
            return True
        if isinstance(call, Call):
            return IncomingCall(connection, call.call_id, call.is_answered, len(data), [call])
        if isinstance(call, More):
            self._grant(connection, call)
        elif isinstance(call, Cancel):
            self._cancel(connection, call.call_id)
        else:
            self._drop(connection, "it said goodbye")
        return True

    def _heard(self, connection: ServerConnection) -> None:
        """A client's first message has come."""

    def _answer_message(self, connection: ServerConnection, messages: list[bytes]) -> bool:
        """Answer a call at once if the core can; False with nothing done, and the message is still in the list."""
        return False

    @abstractmethod
    def _grant(self, connection: ServerConnection, more: More) -> None:
        """Let a stream go on."""

    @abstractmethod
    def _cancel(self, connection: ServerConnection, call_id: int) -> None:
        """Give up a call whose client no longer waits for it; there may be none."""

    @abstractmethod
    def _end_streams(self, connection: ServerConnection) -> None:
        """Give up all streams and deferred replies of a connection that has ended."""

    def _reply(self, connection: ServerConnection, data: bytes | None) -> None:
        """Send a call's reply, if it has one."""
        if not connection.gone and connection.memory.was_cut:  # the reply may have been computed from zeros
            self._refuse(connection, PeerProtocolError("the client has cut a segment short"))
            return
        try:
            if data is not None and not connection.gone and not self._channel.send(connection.client_key, data):
                self._drop(connection, "it no longer reads its replies")
        except BrokenPeer as broken:
            self._refuse(connection, broken.error)

    def _failure(
        self, connection: ServerConnection, call_id: int, method: str, error: BaseException, is_answered: bool = True
    ) -> bytes | None:
        """Count a call's exception, and encode it for its caller; log it if it isn't that caller's own mistake.

        One that no client is told of is always logged, and None is returned.
        """
        self._counters.count_failure()
        debug, data = self._options.debug, None
        is_logged = not (is_answered and isinstance(error, TransportError))
        told = traceback_text(error) if debug or is_logged else ""
        if is_logged:
            logger.error("%s %s raised\n%s", "handler" if is_answered else "one-way call of", printable(method), told)
        if is_answered:
            data = connection.protocol.encode_failure(call_id, error, told if debug else "")
        forget_frames(error)  # a log may keep the error
        error.__traceback__ = None  # that of an error that is raised repeatedly would grow
        return data

    def _drop_ended(self, readable: Sequence[int]) -> None:
        """Drop the clients whose process descriptors became readable because their processes ended."""
        for descriptor in readable:
            connection = self._watched.get(descriptor)
            # Checked again: another client's descriptor may have this number by now.
            if connection is not None and not connection.memory.watch.alive():
                self._drop(connection, "its process ended")

    def _ask_unwatched(self) -> None:
        """Drop ended clients that have no descriptor to tell of their end."""
        for connection in [connection for connection in self._unwatched if not connection.memory.watch.alive()]:
            self._drop(connection, "its process ended")

    def _look_round(self) -> bool:
        """With no message left to receive, do what waits for that; return whether it was a message after all."""
        if time.monotonic() >= self._next_look:
            self._drop_left()
        if not self._to_refuse:
            return False
        self._admit(*self._to_refuse.popleft(), again=True)
        return True

    def _drop_left(self) -> None:
        """Drop clients whose goodbye was lost, as from a queue that was full when they closed.

        Only those that had left at the look before: whatever they sent until then has been received by now.
        """
        self._next_look = time.monotonic() + _LOOK_INTERVAL_S
        for connection in list(self._connections.values()):
            if connection.has_left:
                self._drop(connection, "it left without a goodbye")
            else:
                connection.has_left = connection.memory.watch.has_left()

    def _refuse(self, connection: ServerConnection, error: PeerProtocolError) -> None:
        """Drop a client that sent a malformed message; no other client is affected."""
        logger.warning("client %d broke the protocol: %s", connection.connection_id, error)
        self._send(connection.client_key, Goodbye(shorten(f"protocol error: {error}")))
        self._drop(connection, "protocol error")

    def _admit(self, client_key: bytes, data: bytes, pid: int | None, *, again: bool = False) -> None:
        """Take a message of a client that is not connected, sent by process ``pid`` if known.

        A Hello that can't be granted is considered ``again`` after everything else that has arrived was received:
        another client's goodbye may be among it.
        """
        begins = not self._admission.expects(client_key)
        connection = None
        try:
            answer, admitted = self._admission.answer(client_key, data, pid)
            if admitted is not None:
                connection = self._prepare(client_key, admitted)
        except (PeerProtocolError, OutOfResources) as error:
            answer = Refused(shorten(str(error)))
        else:
            if isinstance(answer, Refused) and begins and not again and len(self._to_refuse) < _MOST_TO_REFUSE:
                self._to_refuse.append((client_key, data, pid))
                return
        if connection is None:
            self._doorbells.stop_if_unused()
            self._leave_unused_doorbells()
        if isinstance(answer, Refused) and client_key != self._last_refused:
            self._last_refused = client_key  # a client that keeps sending is logged once
            logger.warning("a client was refused: %s", answer.reason)
        # The answer goes by ZeroMQ, so it is sent before the client may change its channel.
        answered = answer is None or self._send(client_key, answer)
        if connection is not None:
            self._connect(connection)
            if not answered:
                self._drop(connection, "it went away while connecting")
        elif not answered:
            self._admission.forget(client_key)

    def _prepare(self, client_key: bytes, admitted: Admitted) -> ServerConnection:
        """Do everything that can fail, before a client is told that it is connected.

        Raises:
            OutOfResources: the client can't be served; nothing is kept for it.
        """
        connection = ServerConnection(client_key, self._connected + 1, admitted, self._counters)
        watch = connection.memory.watch
        descriptor = watch.fileno()
        try:
            if descriptor is not None:
                self._channel.watch(descriptor)
                self._watched[descriptor] = connection
            elif watch.must_be_asked:
                self._unwatched.add(connection)
            if self._options.prefault:
                connection.memory.prefault()
        except (OSError, MemoryError) as error:
            self._free(connection)
            raise OutOfResources(f"it can't serve one more client: {reason(error)}") from error
        return connection

    def _connect(self, connection: ServerConnection) -> None:
        """Treat this client's messages as calls from now on."""
        memory = connection.memory
        self._connected += 1
        self._connections[connection.client_key] = connection
        self._channel.know(connection.client_key)
        if memory.ring is not None:
            self._doorbells.connect(connection.client_key, memory.ring)
            self._channel = self._doorbells
        logger.info(
            "client %d connected at %s (%s, %s channel): request arena %s, reply arena %s, process %d",
            connection.connection_id,
            self.address,
            self.scheme,
            self._doorbells.channel_of(connection.client_key),
            size_text(connection.sizes.request_arena_bytes),
            size_text(connection.sizes.reply_arena_bytes),
            memory.watch.pid,
        )

    def _drop(self, connection: ServerConnection, why: str) -> None:
        """End a client's connection, and call the ``on_disconnect`` callbacks."""
        del self._connections[connection.client_key]
        self._doorbells.disconnect(connection.client_key)
        self._free(connection)
        self._leave_unused_doorbells()
        logger.info("client %d disconnected: %s", connection.connection_id, why)
        for callback in self._on_disconnect:
            try:
                callback(connection.connection_id)
            except (SystemExit, KeyboardInterrupt):  # noqa: PERF203
                raise
            except BaseException as error:  # noqa: BLE001 - a callback's mistake must not end the server
                logger.error("an on_disconnect callback raised\n%s", traceback_text(error))

    def _leave_unused_doorbells(self) -> None:
        """Use the ZeroMQ channel directly again once no client uses a doorbell."""
        if not self._doorbells.in_use:
            self._channel = self._zmq
            self._drop_ended(self._doorbells.take_readable())

    def _free(self, connection: ServerConnection) -> None:
        """Give back everything that is held for a client."""
        connection.gone = True
        self._end_streams(connection)
        descriptor = connection.memory.watch.fileno()
        if descriptor is not None and self._watched.pop(descriptor, None) is not None:
            self._channel.unwatch(descriptor)
        self._unwatched.discard(connection)
        self._admission.forget(connection.client_key)
        connection.memory.close()

    def _send(self, client_key: bytes, message: Message) -> bool:
        """Send a message that isn't a reply; False if the client is gone."""
        try:
            return self._channel.send(client_key, encode(message))
        except BrokenPeer:
            return False
