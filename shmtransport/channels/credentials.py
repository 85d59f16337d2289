"""Which process is at the other end of a Unix socket, as the kernel reports it."""

from __future__ import annotations

import socket
import struct

CREDENTIALS = struct.Struct("iII")  # struct ucred: process, user, group


def process_at(sock: socket.socket) -> tuple[int, int]:
    """Return the process at the other end and its user; the process is 0 if it can't be seen from here."""
    pid, uid, _ = CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return pid, uid
