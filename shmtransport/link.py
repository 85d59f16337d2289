"""A client's link: one connection with its channel and protocol, from the handshake to the end."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass

from . import address as addresses
from . import open_files, zmq_context
from .channel import Channel, deadline_in
from .connection import Connection
from .doorbell import DoorbellChannel
from .errors import Closed, ConnectTimeout, LocalProtocolError, PeerDied, PeerProtocolError
from .handshake import ServerReplaced, Wishes, client_handshake
from .message import Goodbye, encode
from .protocol import ClientProtocol
from .statistics import Counters
from .units import size_text
from .zmq_channel import ZmqChannel

logger = logging.getLogger("shmtransport")

_DESCRIPTORS = 14  # two of ZeroMQ, two to watch it, two wake-ups, four of segments, a bell, a pidfd, two spares
_TELL_INTERVAL_S = 5.0
_AGAIN_PAUSE_S = 0.02
_END_SHOWS_S = 0.25  # how long libzmq may take to notice that the process at the other end is gone


@dataclass(frozen=True)
class LinkOptions:
    """What a link is made from; see ``Client``."""

    address: str
    wishes: Wishes
    connect_timeout_s: float
    spin_us: float
    prefault: bool


def check_options(options: LinkOptions) -> str:
    """Check what doesn't need the server, once each option is right by itself; the kind of the address.

    Raises:
        AddressError, LocalProtocolError.
    """
    wishes = options.wishes
    if options.spin_us and wishes.channel == "zmq":
        raise LocalProtocolError(
            f"spin_us={options.spin_us:g}: it is the doorbell channel that can look before it waits"
        )
    return addresses.check_connect(options.address)


class _Held:
    """What a link gives back at its end. It refers neither to the link nor to its client, so that it can outlive them.

    ``release_by`` runs what gives it back; an event loop sets it, to remove its readers first.
    """

    def __init__(self, channel: Channel, connection: Connection, server: str) -> None:
        self._channel = channel
        self._connection = connection
        self._server = server
        self.release_by: Callable[[Callable[[], None]], None] = _at_once

    def release(self, *, flush: bool, wait: bool) -> None:
        """Give all back; results stay valid."""
        self._channel.close(flush=flush, wait=wait)
        bells = self._connection.bells
        if bells is not None and not self._connection.watch.alive():
            bells.peer.remove_if_dead()
        self._connection.close()

    def drop(self) -> None:
        """As ``release``, for a link that was dropped without being closed; may run inside a garbage collection."""
        self.release_by(self._say_goodbye_and_release)
        warnings.warn(
            f"a client of {self._server} was dropped without being closed: call close(), or use it in a 'with' block",
            ResourceWarning,
            stacklevel=2,
        )

    def _say_goodbye_and_release(self) -> None:
        say_goodbye(self._channel, "the client was dropped")
        self.release(flush=True, wait=False)


def _at_once(release: Callable[[], None]) -> None:
    release()


def say_goodbye(channel: Channel, reason: str) -> None:
    """Tell the server that it may free this client's share, if it still reads."""
    with contextlib.suppress(Closed):
        channel.say_goodbye(encode(Goodbye(reason)))


class _ServerLost(Exception):
    """The server went away during the handshake; one that takes its place knows nothing of it."""


class Link:
    """An established connection; ``server`` says in words who is at its other end.

    Dropped without ``close``, in a cycle of references or on any thread, it still gives all back, without waiting.

    Raises:
        ConnectTimeout, ConnectRefused, AddressError, SegmentError, OutOfResources, PeerDied, PeerProtocolError: see
            ``Client``.
    """

    def __init__(self, connecting: Connecting) -> None:
        zmq_channel, self.connection = connecting.connect()
        options = connecting.options
        self.channel: Channel = zmq_channel
        ring, bells = self.connection.ring, self.connection.bells
        if ring is not None and bells is not None:
            self.channel = DoorbellChannel(zmq_channel, ring, bells, options.spin_us)
        self.server_pid = self.connection.watch.pid
        self.server = f"the server at {options.address} (process {self.server_pid})"
        self.held = _Held(self.channel, self.connection, self.server)
        self._at_drop = weakref.finalize(self, self.held.drop)
        self._at_drop.atexit = False  # the kernel gives all back, and other threads may still use it
        if options.prefault:
            self.connection.prefault()
        self.protocol = ClientProtocol(self.connection.codec, connecting.counters)
        sizes = options.wishes.sizes
        logger.info(
            "connected to %s (%s, %s channel): request arena %s, reply arena %s, server process %d",
            options.address,
            addresses.kind(options.address),
            self.channel.kind,
            size_text(sizes.request_arena_bytes),
            size_text(sizes.reply_arena_bytes),
            self.server_pid,
        )

    def died(self) -> PeerDied | None:
        """The error to end with if the server's process is gone, or it has left without a word."""
        if not self.connection.watch.alive():
            return PeerDied(f"{self.server} has ended")
        if self.channel.ended():
            return PeerDied(f"{self.server} has ended the connection")
        return None

    def say_goodbye(self, reason: str) -> None:
        """Tell the server that it may free this client's share, if it still reads."""
        say_goodbye(self.channel, reason)

    def abandon(self) -> None:
        """In a forked child: nothing that is done here may reach the parent's connection."""
        self._at_drop.detach()
        self.channel.abandon()
        self.connection.abandon()

    def close(self, *, flush: bool) -> None:
        """Give all back; results stay valid."""
        if self._at_drop.detach() is not None:
            self.held.release(flush=flush, wait=True)


class Connecting:
    """The handshake with whichever server is at the address, begun again when that server goes away in the middle."""

    def __init__(self, options: LinkOptions, counters: Counters) -> None:
        self.options = options
        self.counters = counters
        self._cancelled = False
        self._channel: ZmqChannel | None = None
        self._started = time.monotonic()
        self._deadline = deadline_in(options.connect_timeout_s)
        self._told = self._started

    def connect(self) -> tuple[ZmqChannel, Connection]:
        """The channel of the handshake, and the connection.

        Raises:
            As ``Link``.
        """
        needed = _DESCRIPTORS + zmq_context.descriptors_to_start()
        open_files.require(needed, f"a connection to {self.options.address}")
        while True:
            with contextlib.suppress(_ServerLost):
                return self._try()
            logger.info("the server at %s went away during the handshake: it is begun again", self.options.address)
            time.sleep(_AGAIN_PAUSE_S)

    def cancel(self) -> None:
        """Make ``connect`` raise ``Closed`` unless it succeeds at once; may be called from any thread."""
        self._cancelled = True
        channel = self._channel
        if channel is not None:
            channel.wake()

    def _try(self) -> tuple[ZmqChannel, Connection]:
        channel = self._channel = ZmqChannel(self.options.address, self.options.wishes.max_message_bytes)
        handshake = client_handshake(self.options.wishes, self.counters)
        try:
            connection = self._shake_hands(channel, handshake)
            self._settle(channel, connection)
        except BaseException as error:
            handshake.close()
            lost = isinstance(error, _ServerLost)
            if not lost:  # the server counts this client as coming, or will when it reads its Hello
                say_goodbye(channel, "connecting failed")
            channel.close(flush=not lost, wait=True)
            raise
        return channel, connection

    @staticmethod
    def _settle(channel: ZmqChannel, connection: Connection) -> None:
        try:
            connection.check_owner(channel.peer_pid)
            channel.settle()
        except BaseException:
            connection.close()
            raise

    def _shake_hands(self, channel: ZmqChannel, handshake: Generator[bytes, bytes, Connection]) -> Connection:
        data = next(handshake)
        while True:
            channel.send(data)
            answer = self._answer(channel)
            try:
                data = handshake.send(answer)
            except StopIteration as end:
                connection: Connection = end.value
                return connection
            except ServerReplaced as error:
                raise _ServerLost from error
            except PeerProtocolError as error:
                channel.wait(_END_SHOWS_S)
                if channel.lost():  # a killed server holds no lock, and its segment may be gone
                    raise PeerDied(f"the server at {self.options.address} ended during the handshake") from error
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
                    f"no server answered at {self.options.address} within {self.options.connect_timeout_s:g} s "
                    f"({addresses.describe(self.options.address)}): start one, check the address, or raise "
                    "connect_timeout_s if it is still starting"
                )
            channel.wait(min(left_s, _TELL_INTERVAL_S))
            self._tell()
        return answer

    def _tell(self) -> None:
        """Log now and then what is waited for."""
        now = time.monotonic()
        if now - self._told >= _TELL_INTERVAL_S:
            self._told = now
            address = self.options.address
            logger.warning(
                "waiting for a server at %s for %.0f s: %s", address, now - self._started, addresses.describe(address)
            )
