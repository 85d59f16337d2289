"""Checks what a user passes to clients and servers, at home and in words, before anything is made or sent.

A count or size is any whole number, also a float or numpy's; a time is any number of seconds from 0 on. None means no
limit where an option takes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from .errors import LocalProtocolError
from .message import CHANNEL_KINDS, MIN_MESSAGE_BYTES, ChannelKind

_FLAGS: tuple[type[Any], ...] = (bool, np.bool_)
_MOST = 2**62  # so that sums of sizes stay within 64 bits


def whole(name: str, value: Any, least: int = 1) -> int:
    """A count or a size.

    Raises:
        LocalProtocolError: it is no whole number, or smaller than ``least``.
    """
    wanted = f"a whole number, {least} or more"
    number = _number(name, value, wanted)
    if not least <= number <= _MOST or number != int(number):
        raise _refused(name, value, wanted)
    return int(number)


def message_bytes(value: Any) -> int:
    """``max_message_bytes``; as ``whole``."""
    return whole("max_message_bytes", value, MIN_MESSAGE_BYTES)


def seconds(name: str, value: Any) -> float:
    """A time that must have an end.

    Raises:
        LocalProtocolError: it is no number, or negative, or has no end.
    """
    wanted = "a number, 0 or more"
    number = _number(name, value, wanted)
    if not 0 <= number <= _MOST:
        raise _refused(name, value, wanted)
    return float(number)


def seconds_or_no_limit(name: str, value: Any) -> float:
    """As ``seconds``; None and infinity mean that there is no limit, and give infinity."""
    if value is None:
        return math.inf
    wanted = "a number of seconds, 0 or more, or None for no limit"
    number = _number(name, value, wanted)
    if number < 0:
        raise _refused(name, value, wanted)
    return math.inf if number > _MOST else float(number)


def flag(name: str, value: Any) -> bool:
    """Something that is either on or off.

    Raises:
        LocalProtocolError: it is neither True nor False.
    """
    if not isinstance(value, _FLAGS):
        raise _refused(name, value, "True or False")
    return bool(value)


def channel_kind(value: Any) -> ChannelKind:
    """One kind of channel.

    Raises:
        LocalProtocolError: there is none of this name.
    """
    for kind in CHANNEL_KINDS:
        if isinstance(value, str) and value == kind:
            return kind
    raise LocalProtocolError(f"there is no channel {_shown(value)}; there are: {', '.join(CHANNEL_KINDS)}")


def channel_kinds(value: Any) -> tuple[ChannelKind, ...]:
    """The kinds of channels that a server offers, at least one.

    Raises:
        LocalProtocolError: it is no list of them.
    """
    if isinstance(value, str) or not isinstance(value, (Sequence, set, frozenset)) or not value:
        raise _refused("channels", value, "a list of one or more of: " + ", ".join(CHANNEL_KINDS))
    wanted = [channel_kind(one) for one in value]
    return tuple(kind for kind in CHANNEL_KINDS if kind in wanted)


def _number(name: str, value: Any, wanted: str) -> Any:
    """A number, which may be infinite."""
    if isinstance(value, _FLAGS) or not isinstance(value, Real) or value != value:
        raise _refused(name, value, wanted)
    return value


def _refused(name: str, value: Any, wanted: str) -> LocalProtocolError:
    return LocalProtocolError(f"{name}={_shown(value)}: it must be {wanted}")


def _shown(value: Any) -> str:
    """A value in one short line, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - what was passed by mistake may fail at anything
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:59]}…"
