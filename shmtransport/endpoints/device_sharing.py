"""Sets up a connection's arenas on a GPU that both sides use, after the handshake.

::

    client                                        server
      call OFFER                       ──►          says which GPU it uses, and the name of a socket
      makes its memory there           ──►          (by that socket: a secret, a description, a file descriptor)
      call SHARE(secret, its cells)    ──►          opens the client's memory, makes its own
                                       ◄──          (by that socket: a description, a file descriptor)
      opens it                         ◄──          its cells
      call USE                         ──►          from now on, both may send tensors there

Rules that it keeps:

* neither side waits for the other by that socket: what is read has been sent before it was asked for;
* the server takes memory only with the secret that came over the connection as well, and from the process that the
  connection is with. Processes of other users are not listened to;
* memory that was made for clients counts until they have let go of it, also after they have gone;
* if something is in the way, the reason is told, and the connection goes on without such arenas.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from ..channels.credentials import process_at
from ..cuda.device_arena import CELLS_BYTES, Shared
from ..cuda.device_memory import DESCRIPTION_BYTES, DeviceMemory
from ..cuda.gpu import Gpu
from ..errors import DeviceError, LocalProtocolError, PeerProtocolError, TransportError
from ..text import printable
from ..units import size_text
from .connection_memory import ConnectionMemory, life_of

OFFER, SHARE, USE = "__device__", "__share_device__", "__use_device__"
NO_GPU = "no GPU"
SHARED = "on the GPU"
"""The path of tensors whose arenas are there."""

_SOCKET = re.compile("shmtransport-[0-9a-f]{32}")
_SECRET_BYTES = 16
_WAITING_AT_MOST = 64
_WAITS_AT_MOST_S = 10.0
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


class _Caller(NamedTuple):
    """A process that has connected to the socket and brought nothing yet."""

    sock: socket.socket
    since: float


class Rendezvous:
    """The socket by which file descriptors cross; what clients have brought waits there until they call.

    Args:
        gpu: The server's.
        limit_bytes: The most memory on the GPU for all clients together.
        most: How many clients may have some.
    """

    def __init__(self, gpu: Gpu, limit_bytes: int, most: int) -> None:
        self._gpu = gpu
        self._limit_bytes = limit_bytes
        self._most = most
        self._name = f"shmtransport-{secrets.token_hex(16)}"
        self._socket: socket.socket | None = None
        self._silent: list[_Caller] = []
        self._waiting: OrderedDict[bytes, _Brought] = OrderedDict()
        self._made: weakref.WeakSet[DeviceMemory] = weakref.WeakSet()
        self._lock = threading.Lock()  # handlers may run in several threads

    def offer(self) -> dict[str, Any]:
        """Return which GPU this is, and the socket's name among the kernel's abstract ones."""
        with self._lock:
            if self._socket is None:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
                sock.bind(f"\0{self._name}")
                sock.listen(_WAITING_AT_MOST)
                self._socket = sock
            self._take_in(self._socket)
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
        copies = memory.copies
        if type(secret) is not bytes or type(cells) is not int or copies is None or copies.prepared is not None:
            raise LocalProtocolError(f"{SHARE} takes a secret and an offset, once")
        with self._lock:
            if self._socket is not None:
                self._take_in(self._socket)
            brought = self._waiting.pop(secret, None)
            if brought is None:
                raise DeviceError("nothing came by the socket: are both processes in one network namespace?")
            with contextlib.closing(brought):
                lives = life_of(memory.watch)
                if memory.watch.pid != brought.pid:
                    raise DeviceError("another process has brought the client's memory")
                requests, replies = sizes
                self._check_limits(replies)
                own = DeviceMemory.make(self._gpu, replies)
                self._made.add(own)
                peers = own.open_peers(self._gpu, requests, brought.descriptor, brought.description)
                released = memory.peers_cells(cells, CELLS_BYTES)
                offset, releases = memory.own_cells(CELLS_BYTES)
                send(brought.sock, own.description(), own.descriptor)
                copies.prepare(Shared(own, peers, released, releases, lives))
                return offset

    def close(self) -> None:
        """Close the socket, and what waits there."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            for caller in self._silent:
                caller.sock.close()
            self._silent.clear()
            while self._waiting:
                self._waiting.popitem()[1].close()

    def _check_limits(self, nbytes: int) -> None:
        """Check that one more client may have memory.

        Raises:
            DeviceError: there is too much of it already.
        """
        taken = sum(len(one) for one in self._made)
        if len(self._made) >= self._most or taken + nbytes > self._limit_bytes:
            raise DeviceError(
                f"{len(self._made)} clients, also such that have gone, hold {size_text(taken)} on the GPU; the "
                f"server's max_clients is {self._most}, its max_total_arena_bytes {size_text(self._limit_bytes)}"
            )

    def _take_in(self, listening: socket.socket) -> None:
        """Read what has come, and forget what has waited for too long; of too many that wait, the oldest go."""
        now = time.monotonic()
        with contextlib.suppress(OSError):  # none is left, or there are too few file descriptors
            for _ in range(2 * _WAITING_AT_MOST):
                sock, _ = listening.accept()
                sock.setblocking(False)
                if process_at(sock)[1] == os.geteuid():
                    self._silent.append(_Caller(sock, now))
                else:
                    sock.close()
        self._silent = [caller for caller in self._silent if not self._has_brought(caller.sock)]
        while self._silent and (len(self._silent) > _WAITING_AT_MOST or self._silent[0].since + _WAITS_AT_MOST_S < now):
            self._silent.pop(0).sock.close()
        while len(self._waiting) > _WAITING_AT_MOST:
            self._waiting.popitem(last=False)[1].close()

    def _has_brought(self, sock: socket.socket) -> bool:
        """Whether a caller is to be waited for no longer: it has brought something, or gone."""
        try:
            data, descriptor = receive(sock)
        except BlockingIOError:
            return False
        except (OSError, PeerProtocolError):
            sock.close()
            return True
        secret, description = data[:_SECRET_BYTES], data[_SECRET_BYTES:]
        pid, _ = process_at(sock)
        brought = _Brought(sock, pid, description, descriptor)
        if secret in self._waiting:
            brought.close()
        else:
            self._waiting[secret] = brought
        return True


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
    lives = life_of(memory.watch)
    requests, replies = sizes
    own = DeviceMemory.make(gpu, requests)
    offset, releases = memory.own_cells(CELLS_BYTES)
    secret = secrets.token_bytes(_SECRET_BYTES)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(_ANSWER_TIMEOUT_S)
        sock.connect(f"\0{offer['socket']}")
        if memory.watch.pid != process_at(sock)[0]:
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
    memory.copies.prepare(Shared(own, peers, memory.peers_cells(cells, CELLS_BYTES), releases, lives))
    call(USE)
    memory.copies.use_arena()


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
