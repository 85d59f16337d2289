"""Direct calls and answers: those that the compiled core handles in one step.

Calls go from a blocking ``Client`` to the ring of a doorbell and back, answers from a message to the reply, of a
``Server`` that runs its handlers itself. What they find in their way, they leave to ``exchange`` and ``server``, which
do the whole of it and are the specification.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ..channels.doorbell import DoorbellChannel
from ..channels.doorbell_server import ThreadDoorbells
from ..core import Counters, DirectAnswers, DirectCalls, answer_in_turn
from .client_connection import ClientConnection
from .server_connection import ServerConnection
from .turns import Turns

_LONGEST_TURN_S = 0.05
_LONGEST_SLEEP_S = 0.1


def direct_calls(
    connection: ClientConnection, turns: Turns, counters: Counters, call_back: Callable[[Any], None]
) -> Any:
    """What makes direct calls over a connection; None if there can be none.

    Args:
        connection: The client's.
        turns: Those who wait for replies.
        counters: Where calls are counted.
        call_back: Takes a call that has ended and has callbacks.
    """
    ring, codec, channel = connection.memory.ring, connection.memory.codec, connection.channel
    if ring is None or not codec.is_plain or not isinstance(channel, DoorbellChannel):
        return None
    return DirectCalls(
        ring,
        connection.protocol.pending,
        connection.protocol.ids,
        codec.loans,
        codec.borrows,
        counters,
        call_back,
        turns.lock.acquire,
        turns.lock.release,
        turns.followers,
        turns.received_for,
        turns.begin_receiving,
        turns.end_receiving,
        codec.max_message_bytes,
        channel.patience,
        channel.bell,
    )


class DirectServing:
    """Answers the clients of one server directly.

    Args:
        doorbells: The server's channel.
        handlers: By name.
        counters: Where calls are counted.
        current: Tells a handler which client it serves.
    """

    def __init__(
        self,
        doorbells: ThreadDoorbells,
        handlers: dict[str, Callable[..., Any]],
        counters: Counters,
        current: ContextVar[weakref.ref[ServerConnection]],
    ) -> None:
        self._doorbells = doorbells
        self._handlers = handlers
        self._counters = counters
        self._current = current
        self._answers: dict[ServerConnection, Any] = {}
        """Of each client by doorbell, those first that are next in turn."""
        self._answers_to_messages: dict[ServerConnection, Any] = {}
        """Of each client by another channel."""

    def add(self, connection: ServerConnection) -> None:
        """Answer a client directly from its second message on, if that can be done."""
        ring, codec = connection.memory.ring, connection.memory.codec
        if not codec.is_plain:
            return
        answers = self._answers_to_messages if ring is None else self._answers
        answers[connection] = DirectAnswers(
            ring,
            self._handlers,
            codec.loans,
            codec.borrows,
            self._counters,
            self._current.set,
            self._current.reset,
            connection.reference,
            codec.max_message_bytes,
        )

    def hear(self, connection: ServerConnection) -> None:
        """A client's first message was received."""
        answers = self._answers.get(connection)
        if answers is not None:
            answers.heard = True

    def remove(self, connection: ServerConnection) -> None:
        """Forget a client that has gone."""
        for answers in (self._answers.pop(connection, None), self._answers_to_messages.pop(connection, None)):
            if answers is not None:
                answers.close()

    def abandon(self) -> None:
        """In a forked child: answer nothing any longer, not even what is being handled."""
        for connection in (*self._answers, *self._answers_to_messages):
            self.remove(connection)

    def answer_message(self, connection: ServerConnection, messages: list[bytes]) -> Any:
        """Answer a message that did not come by a doorbell. It is taken out of the list before its handler runs.

        Returns:
            None with nothing done; True if nothing is left to do; otherwise what is, as ``answer``: usually to send
            the reply.
        """
        answers = self._answers_to_messages.get(connection)
        return None if answers is None else answers.answer(messages)

    @property
    def has_doorbells(self) -> bool:
        """Whether there is a client by doorbell to answer."""
        return bool(self._answers)

    def answer(self) -> bool | tuple[ServerConnection, Any]:
        """Answer what comes, until there is something else to do.

        Returns:
            True after an answer, False if a message is left or none comes for a while; or a client and what is left
            to do of its call: its reply's bytes where its ring has no room, an error that ends its connection, or
            ``(call_id, method, result, error, started)`` of a handler that has returned what only Python can send, or
            has raised.
        """
        doorbells = self._doorbells
        if not 0 < len(self._answers) == doorbells.clients or not doorbells.is_queue_empty:
            return False
        connections = list(self._answers)  # before: a handler may fork, and its child forgets them
        answered: bool | tuple[int, Any] = answer_in_turn(
            tuple(self._answers.values()),
            doorbells.attention,
            doorbells.patience,
            doorbells.bell,
            _LONGEST_TURN_S,
            _LONGEST_SLEEP_S,
        )
        if len(connections) > 1 and (first := connections[0]) in self._answers:
            self._answers[first] = self._answers.pop(first)
        if isinstance(answered, bool):
            return answered
        index, rest = answered
        return connections[index], rest
