"""ZeroMQ's channels: a DEALER socket for a client, a ROUTER socket for a server."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import time

import zmq

from ..errors import AddressError, Closed, OutOfResources
from ..protocol.messages import is_reply
from . import address as addresses
from . import listener, open_files, zmq_context
from .alarm import Alarm
from .backlog import QUEUE_LIMIT, QUEUED_BYTES_LIMIT, Backlogs
from .base import Channel, ServerChannel
from .credentials import CREDENTIALS

_libc = ctypes.CDLL(None, use_errno=True)
_GOODBYE_LINGER_MS = 500
_RETRY_S = 0.01
_CLOSE_PAUSE_S = 50e-6
_HELD_BYTES = 2 << 20
"""Bytes that ZeroMQ itself may hold each way for one peer of a server; it frees them only with the peer's socket."""
_FEWEST_HELD = 8
_SERVER_DESCRIPTORS = 20  # for libzmq's threads and socket, and this channel's own
_LONGEST_WAIT_MS = 1 << 30  # poll() takes a C int
# As plain integers: to combine pyzmq's enumerations takes microseconds.
_READABLE = int(zmq.POLLIN)
_NOW = int(zmq.DONTWAIT)
_NOW_AND_MORE = int(zmq.DONTWAIT | zmq.SNDMORE)


class _Waker:
    """A file descriptor that closes with its last reference: not while a thread writes to it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class ZmqChannel(Channel):
    """A client's end: a DEALER socket. Until ``settle``, ``lost`` reports broken connections.

    Raises:
        AddressError: the address can't be connected to.
        OutOfResources: too few file descriptors are left.
    """

    name = "zmq"

    def __init__(self, address: str, max_message_bytes: int) -> None:
        self._closed = False
        self._socket = zmq_context.open_socket(zmq.DEALER)
        self._monitor: zmq.Socket[bytes] | None = None
        self._waker: _Waker | None = None
        self._connection: tuple[int, int] | None = None  # libzmq's file descriptor and its inode
        self.peer_pid: int | None = None
        try:
            self._socket.maxmsgsize = max_message_bytes
            self._socket.sndhwm = QUEUE_LIMIT
            self._socket.rcvhwm = max(QUEUED_BYTES_LIMIT // max_message_bytes, _FEWEST_HELD)
            self._fd = int(self._socket.get(zmq.FD))
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._waker = _Waker(self._wake_fd)
            self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            self._waited_for = [self._fd, self._wake_fd, int(self._monitor.get(zmq.FD))]
            self._idle_polls: list[select.poll] = []
            self._socket.connect(address)
        except (zmq.ZMQError, OSError) as error:
            self.close(flush=False)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise OutOfResources(f"can't connect to {address}: {error.strerror}") from error
            raise AddressError(f"can't connect to {address}: {error.strerror}") from error

    def lost(self) -> bool:
        """Return whether the connection broke. libzmq reconnects, but what was sent may be lost."""
        if self._monitor is None or not int(self._monitor.get(zmq.EVENTS)) & _READABLE:
            return False
        self._monitor.recv_multipart(zmq.DONTWAIT)
        return True

    def receive_first(self) -> bytes | None:
        """Receive a message of the handshake, and ask the kernel which process sent it."""
        try:
            frame = self._socket.recv(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return None
        self._connection, self.peer_pid = _connection_of(frame)
        return frame.bytes

    def settle(self) -> None:
        """Stop watching for ``lost``; from now on the caller watches the peer's process instead."""
        if self._monitor is not None:
            self._waited_for.remove(int(self._monitor.get(zmq.FD)))
            self._idle_polls.clear()
            self._end_monitor()

    def send(self, data: bytes) -> bool:
        try:
            self._socket.send(data, _NOW)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            raise Closed(f"the channel is closed: {error.strerror}") from error
        return True

    def receive(self) -> bytes | None:
        # Reading EVENTS also re-arms ``fileno``, and costs less than a recv() that raises.
        try:
            if int(self._socket.get(zmq.EVENTS)) & _READABLE:
                return self._socket.recv(_NOW)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            raise Closed(f"the channel is closed: {error.strerror}") from error
        return None

    def wait(self, timeout_s: float) -> bool:
        poll = self._idle_polls.pop() if self._idle_polls else self._new_poll()
        try:
            ready = poll.poll(min(max(timeout_s * 1000, 0), _LONGEST_WAIT_MS))
        finally:
            self._idle_polls.append(poll)
        if len(ready) > 1 or (ready and ready[0][0] == self._wake_fd):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        return True

    def _new_poll(self) -> select.poll:
        """Make a poll object. Each wait needs its own: a signal handler may wait during another wait."""
        poll = select.poll()
        for descriptor in self._waited_for:
            poll.register(descriptor, select.POLLIN)
        return poll

    def wake(self) -> None:
        waker = self._waker
        if waker is not None:
            os.eventfd_write(waker.descriptor, 1)

    def fileno(self) -> int:
        return self._fd

    def ended(self) -> bool:
        return False

    def say_goodbye(self, data: bytes) -> None:
        self.send(data)

    def abandon(self) -> None:
        self._closed = True
        self._waker = None  # it would wake the parent

    def close(self, *, flush: bool, wait: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        self._end_monitor()
        zmq_context.close_socket(self._socket, _GOODBYE_LINGER_MS if flush else 0)
        self._waker = None
        if flush and wait and self._connection is not None:
            _wait_until_closed(*self._connection)

    def _end_monitor(self) -> None:
        if self._monitor is not None:
            self._socket.disable_monitor()  # first, or libzmq's thread could block on an event that is not read
            self._monitor.close(0)
            self._monitor = None


def _connection_of(frame: zmq.Frame) -> tuple[tuple[int, int] | None, int | None]:
    """Find a message's connection, its file descriptor and inode, and the process that sent it.

    The kernel names the process. It doesn't over TCP, or for one in a sibling pid namespace: then it is None.
    """
    place, pid = None, None
    with contextlib.suppress(zmq.ZMQError, OSError, ValueError):  # libzmq has closed it
        fd = int(frame.get(zmq.SRCFD))
        place = fd, os.fstat(fd).st_ino
        pid = _peer_pid(fd)
    return place, pid


def _peer_pid(fd: int) -> int | None:
    """Return which process is at the other end of a descriptor of libzmq's, if the kernel names it.

    Asked without a duplicate: libzmq may have closed it, and to close a duplicate of what has its number by now, such
    as a segment of this process, would end that segment's record lock.

    Raises:
        OSError: it is no socket.
    """
    credentials = ctypes.create_string_buffer(CREDENTIALS.size)
    size = ctypes.c_uint32(CREDENTIALS.size)
    if _libc.getsockopt(fd, socket.SOL_SOCKET, socket.SO_PEERCRED, credentials, ctypes.byref(size)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    pid: int = CREDENTIALS.unpack(credentials.raw)[0]
    return pid or None


def _wait_until_closed(fd: int, inode: int) -> None:
    """Wait until libzmq has flushed and closed a connection, for up to the linger period."""
    deadline = time.monotonic() + _GOODBYE_LINGER_MS / 1000
    with contextlib.suppress(OSError):
        while os.fstat(fd).st_ino == inode and time.monotonic() < deadline:
            time.sleep(_CLOSE_PAUSE_S)


class ZmqServerChannel(ServerChannel):
    """A server's end: a ROUTER socket, and a pipe to wake its thread.

    One edge-triggered epoll object watches everything. So another thread may do the waiting and tell this one, without
    the two taking turns.
    """

    def __init__(self, address: str, max_message_bytes: int) -> None:
        scheme = addresses.check_bind(address)
        open_files.require(_SERVER_DESCRIPTORS, f"a server at {address}")
        self._address = address
        self._closed = False
        self._known: set[bytes] = set()
        self._sender_pid: int | None = None
        self._waker: _Waker | None = None
        self._undo = contextlib.ExitStack()
        try:
            self._socket = zmq_context.open_socket(zmq.ROUTER)
            self._undo.callback(zmq_context.close_socket, self._socket, _GOODBYE_LINGER_MS)
            self._socket.maxmsgsize = max_message_bytes
            self._socket.router_mandatory = True
            self._socket.sndhwm = self._socket.rcvhwm = max(_HELD_BYTES // max_message_bytes, _FEWEST_HELD)
            self._backlogs = Backlogs(self._send)
            self._retry = Alarm()
            self._undo.callback(self._retry.close)
            self._fd = int(self._socket.get(zmq.FD))
            self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._undo.callback(os.close, self._wake_reader)
            self._waker = _Waker(self._wake_writer)
            self._own_descriptors = (self._fd, self._wake_reader, self._retry.fileno())
            self._epoll = self._undo.enter_context(select.epoll())
            for descriptor in self._own_descriptors:
                self.watch(descriptor)
            self._listen(scheme)
        except BaseException as error:
            self._undo.close()
            if isinstance(error, OSError):
                raise OutOfResources(f"a server at {address} can't be made: {error.strerror}") from error
            raise

    def _listen(self, scheme: str) -> None:
        """Listen at the address, and let libzmq accept what the gate lets through."""
        listening = self._listening = self._undo.enter_context(listener.listen(self._address))
        self._socket_file = self._address[len(addresses.IPC) :] if scheme == "ipc" else ""
        if self._socket_file:
            self._undo.callback(_unlink, self._socket_file)
        zmq_fd = os.dup(listening.fileno())  # libzmq closes it with the socket
        try:
            self._socket.setsockopt(zmq.USE_FD, zmq_fd)
            self._socket.bind(self._address)
        except zmq.ZMQError as error:
            os.close(zmq_fd)
            raise AddressError(f"can't bind {self._address}: {error.strerror}") from error
        gate = listener.Gate(listening, zmq_fd)
        self._undo.callback(gate.close)

    def send(self, client_key: bytes, data: bytes) -> bool:
        if self._closed:
            return False
        if client_key not in self._backlogs:
            sent = self._send(client_key, data)
            if sent is not None:
                return sent
            if client_key not in self._known and not is_reply(data):  # nothing is queued for strangers
                return False
        return self._backlogs.add(client_key, data)

    @property
    def sender_pid(self) -> int | None:
        return self._sender_pid

    def know(self, client_key: bytes) -> None:
        self._known.add(client_key)

    def disconnect(self, client_key: bytes) -> None:
        self._known.discard(client_key)
        self._backlogs.leave(client_key)

    def receive(self) -> tuple[bytes, bytes] | None:
        if self._closed:
            return None
        received = self._receive()
        if self._backlogs:
            if received is not None:
                self._backlogs.flush_next()
            else:
                received = self._flush()
        return received

    def _flush(self) -> tuple[bytes, bytes] | None:
        """Send what there is room for, and return a message if one has come.

        ZeroMQ may report room for one peer while it is asked about another, or about messages, and it reports it only
        once. So a timer tries again.
        """
        self._backlogs.flush()
        if self._backlogs:
            self._retry.set(_RETRY_S)
        return self._receive()  # sending may have consumed the event that announces a message

    def _receive(self) -> tuple[bytes, bytes] | None:
        try:
            if int(self._socket.get(zmq.EVENTS)) & _READABLE:
                return self._receive_frames()
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            raise Closed(f"the channel is closed: {error.strerror}") from error
        return None

    def _receive_frames(self) -> tuple[bytes, bytes]:
        """Return a message's sender and bytes; for a stranger, also find out its process."""
        client_key = self._socket.recv(_NOW)
        if client_key in self._known:
            data = self._socket.recv(_NOW)
        else:
            frame = self._socket.recv(_NOW, copy=False)
            _, self._sender_pid = _connection_of(frame)
            data = frame.bytes
        while self._socket.get(zmq.RCVMORE):  # not this protocol's: replaced by an empty message, which is refused
            self._socket.recv(_NOW)
            data = b""
        return client_key, data

    def _send(self, client_key: bytes, data: bytes) -> bool | None:
        """Hand ZeroMQ one message: True if taken, False if the peer is gone, None if it has no room."""
        try:
            self._socket.send(client_key, _NOW_AND_MORE)
            self._socket.send(data, _NOW)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise Closed(f"the channel is closed: {error.strerror}") from error
        return True

    def _flush_for(self, timeout_s: float) -> None:
        """Give clients that read up to ``timeout_s`` seconds to take their queued messages."""
        deadline = time.monotonic() + timeout_s
        self._backlogs.flush()
        while self._backlogs and time.monotonic() < deadline:
            time.sleep(_RETRY_S)
            self._socket.get(zmq.EVENTS)  # lets ZeroMQ notice who has read
            self._backlogs.flush()

    def watch(self, descriptor: int) -> None:
        self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLET)

    def unwatch(self, descriptor: int) -> None:
        self._epoll.unregister(descriptor)

    def wait(self, timeout_s: float | None) -> list[int]:
        self.waits += timeout_s != 0
        return self.poll(timeout_s)

    def poll(self, timeout_s: float | None) -> list[int]:
        """Wait as ``wait`` does, but uncounted: for a thread that waits in the server's place."""
        ready = [descriptor for descriptor, _ in self._epoll.poll(timeout_s)]
        if self._wake_reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_reader, 4096)
        return [descriptor for descriptor in ready if descriptor not in self._own_descriptors]

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def wake_descriptor(self) -> int:
        return self._wake_writer

    def wake(self) -> None:
        waker = self._waker
        if waker is not None:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # it is about to wake anyway, or being closed
                os.write(waker.descriptor, b"\0")

    def remove_names(self) -> None:
        if not self._closed and self._socket_file:
            _unlink(self._socket_file)

    def abandon(self) -> None:
        self._closed = True
        self._waker = None  # it would wake the parent
        self._listening.detach()

    def close(self, *, flush: bool = True) -> None:
        if self._closed:
            return
        if flush and self._backlogs:
            self._flush_for(_GOODBYE_LINGER_MS / 1000)
        self._closed = True
        self._waker = None
        self._undo.close()


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
