"""ZeroMQ's channels: a DEALER socket for a client, a ROUTER socket for a server and all of its clients."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time

import zmq

from . import address as addresses
from . import listener, open_files, zmq_context
from .alarm import Alarm
from .backlog import QUEUE_LIMIT, QUEUED_BYTES_LIMIT, Backlogs
from .channel import Channel, ServerChannel
from .errors import AddressError, Closed, OutOfResources
from .message import is_reply

_GOODBYE_LINGER_MS = 500
_RETRY_S = 0.01
_CLOSE_PAUSE_S = 50e-6
_HELD_BYTES = 2 << 20
"""What ZeroMQ itself holds for or of one peer of a server: it frees none of that before the peer's socket goes."""
_FEWEST_HELD = 8
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group
_SERVER_DESCRIPTORS = 20  # what libzmq needs for its threads and a socket, and this side's own
_LONGEST_WAIT_MS = 1 << 30  # poll takes no more than an int


class _Waker:
    """A file descriptor that is closed when the last reference goes: never while a thread is about to write to it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class ZmqChannel(Channel):
    """DEALER socket. ``lost`` tells whether the connection broke before ``settle`` was called.

    Raises:
        AddressError: the address can't be connected to.
        OutOfResources: too few file descriptors are left.
    """

    kind = "zmq"

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
        """Whether the connection broke: libzmq makes a new one, and what was sent over the old one may be lost."""
        if self._monitor is None or not int(self._monitor.get(zmq.EVENTS)) & zmq.POLLIN:
            return False
        self._monitor.recv_multipart(zmq.DONTWAIT)
        return True

    def receive_first(self) -> bytes | None:
        """As ``receive``, of a message of the handshake; also learns from the kernel which process sent it."""
        try:
            frame = self._socket.recv(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return None
        self._connection, self.peer_pid = _connection_of(frame)
        return frame.bytes

    def settle(self) -> None:
        """Stop watching for ``lost``: from now on the peer's process is watched instead."""
        if self._monitor is not None:
            self._waited_for.remove(int(self._monitor.get(zmq.FD)))
            self._idle_polls.clear()
            self._end_monitor()

    def send(self, data: bytes) -> bool:
        try:
            self._socket.send(data, zmq.DONTWAIT)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            raise Closed(f"the channel is closed: {error.strerror}") from error
        return True

    def receive(self) -> bytes | None:
        # Looking is also what re-arms ``fileno``; recv() would raise for nothing, which takes longer.
        try:
            if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
                return self._socket.recv(zmq.DONTWAIT)
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
        """One for each wait that is under way: a signal handler may wait in the middle of another's."""
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
            self._socket.disable_monitor()  # first: libzmq's thread would wait without end for an event to be taken
            self._monitor.close(0)
            self._monitor = None


def _connection_of(frame: zmq.Frame) -> tuple[tuple[int, int] | None, int | None]:
    """The connection that a message came by, its file descriptor and inode, and the process at its other end.

    The kernel tells the process; None where it doesn't: over TCP, and for one in a pid namespace beside this one.
    """
    place, pid = None, None
    with contextlib.suppress(zmq.ZMQError, OSError, ValueError):  # libzmq has closed it
        fd = int(frame.get(zmq.SRCFD))
        place = fd, os.fstat(fd).st_ino
        with socket.socket(fileno=os.dup(fd)) as connection:
            if connection.family == socket.AF_UNIX:
                credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                pid = _CREDENTIALS.unpack(credentials)[0] or None
    return place, pid


def _wait_until_closed(fd: int, inode: int) -> None:
    """Wait until libzmq has sent what was queued for a connection and closed it, for up to its linger period."""
    deadline = time.monotonic() + _GOODBYE_LINGER_MS / 1000
    with contextlib.suppress(OSError):
        while os.fstat(fd).st_ino == inode and time.monotonic() < deadline:
            time.sleep(_CLOSE_PAUSE_S)


class ZmqServerChannel(ServerChannel):
    """ROUTER socket, with a pipe beside it to be woken by.

    Everything is waited for by one epoll object, edge-triggered: so another thread may do the waiting, and tell this
    one, without the two having to take turns.
    """

    def __init__(self, address: str, max_message_bytes: int) -> None:
        scheme = addresses.check_bind(address)
        open_files.require(_SERVER_DESCRIPTORS, f"a server at {address}")
        self._address = address
        self._closed = False
        self._known: set[bytes] = set()
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

    def send(self, peer: bytes, data: bytes) -> bool:
        if self._closed:
            return False
        if peer not in self._backlogs:
            sent = self._send(peer, data)
            if sent is not None:
                return sent
            if not is_reply(data):  # a stranger's answer, perhaps: nothing is kept for strangers
                return False
        return self._backlogs.add(peer, data)

    def know(self, peer: bytes) -> None:
        self._known.add(peer)

    def disconnect(self, peer: bytes) -> None:
        self._known.discard(peer)
        self._backlogs.leave(peer)

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
        """Send what there is room for; a message that has come meanwhile.

        That there is room again for one peer ZeroMQ may tell while it is asked about another, or about messages, and
        then not once more: so this is tried again after a while, too.
        """
        self._backlogs.flush()
        if self._backlogs:
            self._retry.set(_RETRY_S)
        return self._receive()  # sending may have taken away what would have told of a message

    def _receive(self) -> tuple[bytes, bytes] | None:
        try:
            if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
                return self._receive_frames()
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            raise Closed(f"the channel is closed: {error.strerror}") from error
        return None

    def _receive_frames(self) -> tuple[bytes, bytes]:
        """Who sent a message, and its bytes; of a stranger's also by which process it was sent."""
        peer = self._socket.recv(zmq.DONTWAIT)
        if peer in self._known:
            data = self._socket.recv(zmq.DONTWAIT)
        else:
            frame = self._socket.recv(zmq.DONTWAIT, copy=False)
            _, self.sender_pid = _connection_of(frame)
            data = frame.bytes
        while self._socket.get(
            zmq.RCVMORE
        ):  # no message of this protocol: an empty one takes its place, and is refused
            self._socket.recv(zmq.DONTWAIT)
            data = b""
        return peer, data

    def _send(self, peer: bytes, data: bytes) -> bool | None:
        """Hand one message to ZeroMQ: True if that was done, False if the peer is gone, None if there is no room."""
        try:
            self._socket.send_multipart((peer, data), zmq.DONTWAIT)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise Closed(f"the channel is closed: {error.strerror}") from error
        return True

    def _flush_for(self, timeout_s: float) -> None:
        """Give those that do read so much time to read what waits for them."""
        deadline = time.monotonic() + timeout_s
        self._backlogs.flush()
        while self._backlogs and time.monotonic() < deadline:
            time.sleep(_RETRY_S)
            self._socket.get(zmq.EVENTS)  # lets ZeroMQ see who has read on
            self._backlogs.flush()

    def watch(self, descriptor: int) -> None:
        self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLET)

    def unwatch(self, descriptor: int) -> None:
        self._epoll.unregister(descriptor)

    def wait(self, timeout_s: float | None) -> list[int]:
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
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # it will wake, or it is being closed
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
