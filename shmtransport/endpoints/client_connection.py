"""A client's connection: its channel, memory and protocol, from the handshake to the end."""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Generator

from ..channels import address as addresses
from ..channels import open_files, zmq_context
from ..channels.base import Channel, deadline_in
from ..channels.doorbell import DoorbellChannel
from ..channels.zmq import ZmqChannel
from ..core import Counters
from ..cuda.copies import NewCopies
from ..errors import Closed, ConnectTimeout, PeerDied, PeerProtocolError, TransportError
from ..protocol.calls import ClientProtocol
from ..protocol.messages import Goodbye, encode
from ..units import size_text
from .connection_memory import ConnectionMemory, warn_of_drop
from .device_sharing import NO_GPU
from .handshake import ServerReplaced, client_handshake
from .options import ClientOptions, patience_of

logger = logging.getLogger("shmtransport")

_DESCRIPTORS = 14  # two of ZeroMQ, two to watch it, two wake-ups, four of segments, a pidfd, three spare
_TELL_INTERVAL_S = 5.0
_AGAIN_PAUSE_S = 0.02
_END_SHOWS_S = 0.25  # how long libzmq may take to notice that the process at the other end is gone


class _Held:
    """What a connection gives back at its end. It refers neither to it nor to its client, so that it can outlive them.

    ``release_by`` runs the function that gives everything back; an event loop sets it, to remove its readers first.
    """

    def __init__(self, channel: Channel, memory: ConnectionMemory, server: str) -> None:
        self._channel = channel
        self._memory = memory
        self._server = server
        self.release_by: Callable[[Callable[[], None]], None] = _at_once

    def release(self, *, flush: bool, wait: bool) -> None:
        """Give everything back; results stay valid."""
        self._channel.close(flush=flush, wait=wait)
        self._memory.close()

    def drop(self) -> None:
        """As ``release``, for a connection that was dropped unclosed; may run inside a garbage collection."""
        self.release_by(self._say_goodbye_and_release)
        warn_of_drop(f"a client of {self._server}")

    def _say_goodbye_and_release(self) -> None:
        say_goodbye(self._channel, "the client was dropped")
        self.release(flush=True, wait=False)


def _at_once(release: Callable[[], None]) -> None:
    release()


def say_goodbye(channel: Channel, reason: str) -> None:
    """Tell the server, if it still reads, that it may free what this client holds."""
    with contextlib.suppress(Closed):
        channel.say_goodbye(encode(Goodbye(reason)))


class _ServerLost(Exception):
    """The server went away during the handshake; one that replaces it knows nothing of it."""


class ClientConnection:
    """An established connection; ``server`` describes the other end in words.

    Dropped without ``close``, in a cycle of references or on any thread, it still gives everything back, without
    waiting.

    Raises:
        TransportError: any error that ``Client`` raises when it connects.
        Closed: ``connecting`` was cancelled.
    """

    def __init__(self, connecting: Connecting) -> None:
        zmq_channel, self.memory = connecting.connect()
        address, options = connecting.address, connecting.options
        self.channel: Channel = zmq_channel
        ring = self.memory.ring
        if ring is not None:
            self.channel = DoorbellChannel(zmq_channel, ring, patience_of(options.spin_us))
        self.server_pid = self.memory.watch.pid
        self.sizes = options.arena_bytes, options.reply_arena_bytes
        self.device_path = NO_GPU
        """How tensors get from the client's GPU to the server and back, in words."""
        self.server = f"the server at {address} (process {self.server_pid})"
        self.held = _Held(self.channel, self.memory, self.server)
        self._at_drop = weakref.finalize(self, self.held.drop)
        self._at_drop.atexit = False  # the kernel gives everything back, and other threads may still use it
        if options.prefault:
            self.memory.prefault()
        self.protocol = ClientProtocol(self.memory.codec, connecting.counters)
        logger.info(
            "connected to %s (%s, %s channel): request arena %s, reply arena %s, server process %d",
            address,
            addresses.scheme_of(address),
            self.channel.name,
            size_text(options.arena_bytes),
            size_text(options.reply_arena_bytes),
            self.server_pid,
        )

    def died(self) -> TransportError | None:
        """The error to end with if the server has ended or closed the connection, or cut a segment short; else None."""
        if self.memory.was_cut:
            return PeerProtocolError(f"{self.server} has cut a segment short")
        if not self.memory.watch.alive():
            return PeerDied(f"{self.server} has ended")
        if self.channel.ended():
            return PeerDied(f"{self.server} has ended the connection")
        return None

    def say_goodbye(self, reason: str) -> None:
        """Tell the server, if it still reads, that it may free what this client holds."""
        say_goodbye(self.channel, reason)

    def abandon(self) -> None:
        """Give up the connection in a forked child, without touching the parent's."""
        self._at_drop.detach()
        self.channel.abandon()
        self.memory.abandon()

    def close(self, *, flush: bool) -> None:
        """Give everything back; results stay valid."""
        if self._at_drop.detach() is not None:
            self.held.release(flush=flush, wait=True)


class Connecting:
    """The handshake with the server at an address; starts again if that server goes away in the middle."""

    def __init__(
        self,
        address: str,
        options: ClientOptions,
        claim_timeout_s: float,
        counters: Counters,
        new_copies: NewCopies | None = None,
    ) -> None:
        self.address = address
        self.options = options
        self._claim_timeout_s = claim_timeout_s
        self.counters = counters
        self._new_copies = new_copies
        self._cancelled = False
        self._channel: ZmqChannel | None = None
        self._started = time.monotonic()
        self._deadline = deadline_in(options.connect_timeout_s)
        self._told = self._started

    def connect(self) -> tuple[ZmqChannel, ConnectionMemory]:
        """Complete a handshake; return its channel and the connection's memory.

        Raises:
            TransportError: any error that ``Client`` raises when it connects.
            Closed: ``cancel`` was called.
        """
        needed = _DESCRIPTORS + zmq_context.descriptors_to_start()
        open_files.require(needed, f"a connection to {self.address}")
        while True:
            with contextlib.suppress(_ServerLost):
                return self._try()
            logger.info("the server at %s went away during the handshake: starting again", self.address)
            time.sleep(_AGAIN_PAUSE_S)

    def cancel(self) -> None:
        """Make ``connect`` raise ``Closed`` unless it is just succeeding; any thread may call it."""
        self._cancelled = True
        channel = self._channel
        if channel is not None:
            channel.wake()

    def _try(self) -> tuple[ZmqChannel, ConnectionMemory]:
        channel = self._channel = ZmqChannel(self.address, self.options.max_message_bytes)
        handshake = client_handshake(self.options, self._claim_timeout_s, self.counters, self._new_copies)
        try:
            memory = self._shake_hands(channel, handshake)
            self._settle(channel, memory)
        except BaseException as error:
            handshake.close()
            lost = isinstance(error, _ServerLost)
            if not lost:  # the server counts this client, or will when it reads the Hello
                say_goodbye(channel, "connecting failed")
            channel.close(flush=not lost, wait=True)
            raise
        return channel, memory

    @staticmethod
    def _settle(channel: ZmqChannel, memory: ConnectionMemory) -> None:
        try:
            memory.check_owner(channel.peer_pid)
            channel.settle()
        except BaseException:
            memory.close()
            raise

    def _shake_hands(
        self, channel: ZmqChannel, handshake: Generator[bytes, bytes, ConnectionMemory]
    ) -> ConnectionMemory:
        data = next(handshake)
        while True:
            channel.send(data)
            answer = self._answer(channel)
            try:
                data = handshake.send(answer)
            except StopIteration as end:
                memory: ConnectionMemory = end.value
                return memory
            except ServerReplaced as error:
                raise _ServerLost from error
            except PeerProtocolError as error:
                channel.wait(_END_SHOWS_S)
                if channel.lost():  # a killed server holds no lock, and its segment may be gone
                    raise PeerDied(f"the server at {self.address} ended during the handshake") from error
                raise

    def _answer(self, channel: ZmqChannel) -> bytes:
        while (answer := channel.receive_first()) is None:
            if self._cancelled:
                raise Closed("connecting was cancelled")
            if channel.lost():
                raise _ServerLost
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                raise ConnectTimeout(
                    f"no server answered at {self.address} within {self.options.connect_timeout_s:g} s "
                    f"({addresses.describe(self.address)}): start one, check the address, or raise "
                    "connect_timeout_s if it is still starting"
                )
            channel.wait(min(left_s, _TELL_INTERVAL_S))
            self._tell()
        return answer

    def _tell(self) -> None:
        """Log every few seconds what the client is waiting for."""
        now = time.monotonic()
        if now - self._told >= _TELL_INTERVAL_S:
            self._told = now
            address = self.address
            logger.warning(
                "waiting for a server at %s for %.0f s: %s", address, now - self._started, addresses.describe(address)
            )
