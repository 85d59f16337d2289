"""Sets up a connection's arenas on a GPU that both sides use, after the handshake.

::

    client                                        server
      call OFFER                       ──►          says which GPU it uses, and the name of a socket
      makes its memory there           ──►          (by that socket: a secret, a description, a file descriptor)
      call SHARE(secret, its cells)    ──►          opens the client's memory, makes its own
                                       ◄──          (by that socket: a description, a file descriptor)
      opens it                         ◄──          its cells

Rules that it keeps:

* neither side waits for the other by that socket: what is read has been sent before it was asked for;
* the server takes what a secret belongs to, which only the connection's client knows, from nobody but the process that
  the connection is with, where the kernel tells;
* whatever is in the way is told in words, and the connection goes on without such arenas.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from ..cuda.device_arena import CELLS_BYTES
from ..cuda.device_memory import DESCRIPTION_BYTES, DeviceMemory
from ..cuda.gpu import Gpu
from ..errors import DeviceError, LocalProtocolError, PeerProtocolError, TransportError
from ..text import printable
from .connection_memory import ConnectionMemory

OFFER, SHARE = "__device__", "__share_device__"
NO_GPU = "no GPU"
SHARED = "on the GPU"
"""The path of tensors whose arenas are there."""

_SOCKET = re.compile("shmtransport-[0-9a-f]{32}")
_SECRET_BYTES = 16
_WAITING_AT_MOST = 64
_CREDENTIALS = struct.Struct("iII")  # of SO_PEERCRED: pid, uid, gid
_ANSWER_TIMEOUT_S = 1.0


class _Brought(NamedTuple):
    """What a client has brought to the socket."""

    sock: socket.socket
    pid: int
    description: bytes
    descriptor: int

    def close(self) -> None:
        self.sock.close()
        os.close(self.descriptor)


class Rendezvous:
    """The socket by which file descriptors cross; clients that have come wait there until they call.

    Args:
        gpu: The server's.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._name = f"shmtransport-{secrets.token_hex(16)}"
        self._socket: socket.socket | None = None
        self._waiting: OrderedDict[bytes, _Brought] = OrderedDict()

    def offer(self) -> dict[str, Any]:
        """Return which GPU this is, and the socket's name among the kernel's abstract ones."""
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            self._socket.bind(f"\0{self._name}")
            self._socket.listen(_WAITING_AT_MOST)
        return {"gpu": self._gpu.uuid, "socket": self._name}

    def share(self, memory: ConnectionMemory, sizes: tuple[int, int], secret: Any, cells: Any) -> int:
        """Share memory with the client that has brought this secret.

        Args:
            memory: The connection's.
            sizes: Of the request and the reply arena, in bytes.
            secret: What it has sent by its connection, and by the socket.
            cells: Where in its segment it releases tensors of this side.

        Returns:
            Where in this side's segment tensors of the client are released.

        Raises:
            TransportError: That can't be done.
        """
        if type(secret) is not bytes or type(cells) is not int or memory.copies is None or memory.copies.arena:
            raise LocalProtocolError(f"{SHARE} takes a secret and an offset, once")
        self._take_in()
        brought = self._waiting.pop(secret, None)
        if brought is None:
            raise DeviceError("nothing came by the socket: are both processes in one network namespace?")
        with contextlib.closing(brought):
            if 0 < memory.watch.pid != brought.pid:
                raise DeviceError("another process has brought the client's memory, or one of another PID namespace")
            requests, replies = sizes
            own = DeviceMemory.make(self._gpu, replies)
            peers = own.open_peers(self._gpu, requests, brought.descriptor, brought.description)
            released = memory.peers_cells(cells, CELLS_BYTES)
            offset, releases = memory.own_cells(CELLS_BYTES)
            send(brought.sock, own.description(), own.descriptor)
            memory.copies.share(own, peers, released, releases)
            return offset

    def close(self) -> None:
        """Close the socket, and what waits there."""
        if self._socket is not None:
            self._socket.close()
        while self._waiting:
            self._waiting.popitem()[1].close()

    def _take_in(self) -> None:
        """Read what has come; of too many that wait, the oldest goes."""
        for _ in range(_WAITING_AT_MOST):
            if self._socket is None:
                return
            try:
                sock, _ = self._socket.accept()
            except OSError:  # none is left, or there are too few file descriptors
                return
            sock.setblocking(False)
            try:
                data, descriptor = receive(sock)
            except (OSError, PeerProtocolError):
                sock.close()
                continue
            secret, description = data[:_SECRET_BYTES], data[_SECRET_BYTES:]
            if secret in self._waiting:
                sock.close()
                os.close(descriptor)
                continue
            self._waiting[secret] = _Brought(sock, _process_at(sock), description, descriptor)
            if len(self._waiting) > _WAITING_AT_MOST:
                self._waiting.popitem(last=False)[1].close()


def share_device(gpu: Gpu, memory: ConnectionMemory, sizes: tuple[int, int], call: Callable[..., Any]) -> str:
    """Share memory on the GPU with the server, from the client's side.

    Args:
        gpu: The client's.
        memory: The connection's.
        sizes: Of the request and the reply arena, in bytes.
        call: Calls a method of the server.

    Returns:
        ``SHARED``, or why that can't be done.
    """
    try:
        _share(gpu, memory, sizes, call)
    except (TransportError, OSError) as error:
        return f"not on the GPU: {printable(str(error))}"
    return SHARED


def _share(gpu: Gpu, memory: ConnectionMemory, sizes: tuple[int, int], call: Callable[..., Any]) -> None:
    offer = call(OFFER)
    if type(offer) is not dict or not _SOCKET.fullmatch(str(offer.get("socket"))):
        raise PeerProtocolError("the server has offered something that is no GPU")
    if offer.get("gpu") != gpu.uuid:
        raise DeviceError("the server uses another GPU")
    if memory.copies is None:
        raise DeviceError("this client has no GPU")
    requests, replies = sizes
    own = DeviceMemory.make(gpu, requests)
    offset, releases = memory.own_cells(CELLS_BYTES)
    secret = secrets.token_bytes(_SECRET_BYTES)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(_ANSWER_TIMEOUT_S)
        sock.connect(f"\0{offer['socket']}")
        if 0 < memory.watch.pid != _process_at(sock):
            raise PeerProtocolError("the server has offered the socket of another process")
        send(sock, secret + own.description(), own.descriptor)
        cells = call(SHARE, secret, offset)
        if type(cells) is not int:
            raise PeerProtocolError("the server has not told where it releases tensors")
        description, descriptor = receive(sock)
    try:
        peers = own.open_peers(gpu, replies, descriptor, description)
    finally:
        os.close(descriptor)
    memory.copies.share(own, peers, memory.peers_cells(cells, CELLS_BYTES), releases)


def _process_at(sock: socket.socket) -> int:
    """The process at the other end, as the kernel reports it."""
    pid, _, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(pid)


def send(sock: socket.socket, data: bytes, descriptor: int) -> None:
    """Send a message with one file descriptor."""
    socket.send_fds(sock, [data], [descriptor])


def receive(sock: socket.socket) -> tuple[bytes, int]:
    """Receive such a message; the file descriptor is the caller's.

    Raises:
        PeerProtocolError: It is another.
        OSError: There is none.
    """
    largest = _SECRET_BYTES + DESCRIPTION_BYTES
    data, descriptors, flags, _ = socket.recv_fds(sock, largest, 1, socket.MSG_CMSG_CLOEXEC)
    if len(descriptors) == 1 and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        return data, descriptors[0]
    for descriptor in descriptors:
        os.close(descriptor)
    raise PeerProtocolError("the peer has sent no memory on a GPU")
