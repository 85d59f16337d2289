"""What an attack is, and the tools that it gets."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq

from shmtransport.protocol.messages import DEFAULT_MAX_MESSAGE_BYTES, ChannelKind, Message

from .peers import ARENA_BYTES, Impostor, Raw, Wire

BOTH: tuple[ChannelKind, ...] = ("zmq", "doorbell")


class Scene:
    """Makes the attacker's sockets and connections; all are closed in the end.

    ``address`` is the server's, ``server_pid`` its process, ``channel`` the one that the attack is to take; ``calls()``
    tells how many calls each of the innocent clients has made.
    """

    def __init__(self, address: str, server_pid: int, channel: ChannelKind, calls: Callable[[], list[int]]) -> None:
        self.address = address
        self.server_pid = server_pid
        self.channel = channel
        self.calls = calls
        self._context: zmq.Context[Any] = zmq.Context()
        self._made: list[Wire | Raw | Impostor] = []

    def wire(self, *, queue: int = 10_000) -> Wire:
        """A bare socket of a stranger."""
        one = Wire(self._context, self.address, queue=queue)
        self._made.append(one)
        return one

    def raw(self) -> Raw:
        """A stream socket that has connected and said nothing."""
        one = Raw(self.address)
        self._made.append(one)
        return one

    def impostor(
        self,
        *,
        arena_bytes: int = ARENA_BYTES,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        channel: ChannelKind | None = None,
        queue: int = 10_000,
    ) -> Impostor:
        """A connected client."""
        one = Impostor(self.wire(queue=queue), channel or self.channel, arena_bytes, max_message_bytes)
        self._made.append(one)
        return one

    def assert_each_costs_the_connection(self, messages: list[bytes] | list[Message]) -> None:
        """Check that a client that sends any one of these loses its connection."""
        for message in messages:
            one = self.impostor()
            one.send(message)
            try:
                one.assert_dropped()
            except AssertionError as error:
                raise AssertionError(f"{message!r}: {error}") from error

    def while_others_call(self, step: Callable[[], object], calls: int = 50) -> None:
        """Do something again and again, until each innocent client has made this many calls meanwhile."""
        before, deadline = self.calls(), time.monotonic() + 25.0
        while any(now - was < calls for now, was in zip(self.calls(), before, strict=True)):
            assert time.monotonic() < deadline, f"the others' calls stand still: {before}, then {self.calls()}"
            step()

    def close(self) -> None:
        for one in reversed(self._made):
            one.close()
        self._context.term()


@dataclass(frozen=True)
class Attack:
    """One way of breaking the rules; ``act`` does it, and checks what happens to the attacker."""

    name: str
    channel: ChannelKind
    act: Callable[[Scene], None]

    def __str__(self) -> str:
        return f"{self.name}-{self.channel}"


ATTACKS: list[Attack] = []


def attack(*channels: ChannelKind) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Decorator: add a function to the table, once for each of these channels; its docstring describes the attack."""

    def register(act: Callable[[Scene], None]) -> Callable[[Scene], None]:
        assert act.__doc__
        ATTACKS.extend(Attack(act.__name__, channel, act) for channel in channels)
        return act

    return register
