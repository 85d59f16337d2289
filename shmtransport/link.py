"""A client's link: one connection with its channel and protocol, from the handshake to the end."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator
from dataclasses import dataclass

from . import address as addresses
from .channel import Channel, ZmqChannel, deadline_in
from .connection import Connection
from .doorbell import DoorbellChannel
from .errors import Closed, ConnectTimeout, LocalProtocolError, PeerDied
from .handshake import Wishes, client_handshake
from .message import Goodbye, encode
from .protocol import ClientProtocol
from .statistics import Counters
from .units import size_text

logger = logging.getLogger("shmtransport")


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


class Link:
    """An established connection; ``server`` says in words who is at its other end.

    Raises:
        ConnectTimeout, ConnectRefused, AddressError, SegmentError, PeerProtocolError: see ``Client``.
    """

    def __init__(self, options: LinkOptions, counters: Counters) -> None:
        self.channel: Channel = ZmqChannel(options.address, options.wishes.max_message_bytes)
        handshake = client_handshake(options.wishes, counters)
        try:
            self.connection = self._connect(handshake, options)
        except BaseException as error:
            handshake.close()
            answered = not isinstance(error, ConnectTimeout)
            if answered:  # the server counts this client as coming
                self.say_goodbye("connecting failed")
            self.channel.close(flush=answered)
            raise
        if options.prefault:
            self.connection.prefault()
        ring, bells = self.connection.ring, self.connection.bells
        if ring is not None and bells is not None:
            self.channel = DoorbellChannel(self.channel, ring, bells, options.spin_us)
        self.protocol = ClientProtocol(self.connection.codec, counters)
        self.server_pid = self.connection.watch.pid
        self.server = f"the server at {options.address} (process {self.server_pid})"
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
        with contextlib.suppress(Closed):
            self.channel.say_goodbye(encode(Goodbye(reason)))

    def abandon(self) -> None:
        """In a forked child: nothing that is done here may reach the parent's connection."""
        self.channel.abandon()
        self.connection.abandon()

    def close(self, *, flush: bool) -> None:
        """Give all back; results stay valid."""
        self.channel.close(flush=flush)
        self.connection.close()

    def _connect(self, handshake: Generator[bytes, bytes, Connection], options: LinkOptions) -> Connection:
        deadline = deadline_in(options.connect_timeout_s)
        data = next(handshake)
        while True:
            self.channel.send(data)
            while (answer := self.channel.receive()) is None:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise ConnectTimeout(
                        f"no server answered at {options.address} within {options.connect_timeout_s:g} s: start one, "
                        "check the address, or raise connect_timeout_s if it is still starting"
                    )
                self.channel.wait(left_s)
            try:
                data = handshake.send(answer)
            except StopIteration as end:
                connection: Connection = end.value
                return connection
