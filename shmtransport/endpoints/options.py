"""The options of clients and servers, checked before anything is created or sent.

A count or size may be any whole number, including a float or one of numpy's; a time may be any number from 0 up. Where
a time-out may be None, that means no limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch

from ..core import Patience
from ..errors import LocalProtocolError
from ..memory.segment import shared_memory_room
from ..protocol.messages import CHANNEL_KINDS, DEFAULT_MAX_MESSAGE_BYTES, MAX_WINDOW, MIN_MESSAGE_BYTES, ChannelKind
from ..units import MIB

DEFAULT_ARENA_BYTES = 64 * MIB
DEFAULT_MAX_ARENA_BYTES = 8 << 30
CONNECT_TIMEOUT_S = 30.0  # a server that is started together with its client imports torch first

_GPU = re.compile(r"cuda(?::([0-9]{1,3}))?")
_FLAGS: tuple[type[Any], ...] = (bool, np.bool_)
_MOST_THREADS = 1024
_MOST = 2**62  # so that sums of sizes stay within 64 bits


def whole(name: str, value: Any, least: int = 1) -> int:
    """Check a count or a size.

    Args:
        name: the option's name, for the error.
        value: what the user gave.
        least: the smallest valid value (default 1).

    Raises:
        LocalProtocolError: it is not a whole number, or smaller than ``least``.
    """
    wanted = f"a whole number, {least} or more"
    number = _number(name, value, wanted)
    if not least <= number <= _MOST or number != int(number):
        raise _refused(name, value, wanted)
    return int(number)


def message_bytes(name: str, value: Any) -> int:
    """Check a limit on control messages, in bytes; as ``whole``."""
    return whole(name, value, MIN_MESSAGE_BYTES)


def seconds(name: str, value: Any) -> float:
    """Check a time that must be finite.

    Raises:
        LocalProtocolError: it is not a number, or negative, or infinite.
    """
    wanted = "a number, 0 or more"
    number = _number(name, value, wanted)
    if not 0 <= number <= _MOST:
        raise _refused(name, value, wanted)
    return float(number)


def seconds_or_no_limit(name: str, value: Any) -> float:
    """Check a time as ``seconds`` does; None and infinity mean no limit and return infinity."""
    if value is None:
        return math.inf
    wanted = "a number of seconds, 0 or more, or None for no limit"
    number = _number(name, value, wanted)
    if number < 0:
        raise _refused(name, value, wanted)
    return math.inf if number > _MOST else float(number)


def parts_ahead(name: str, value: Any) -> int:
    """Check how many parts of a stream may be made before they are taken: from 1 to ``MAX_WINDOW``; as ``whole``."""
    return _at_most(MAX_WINDOW, name, value)


def thread_count(name: str, value: Any) -> int:
    """Check a number of threads, from 1 to 1024; as ``whole``."""
    return _at_most(_MOST_THREADS, name, value)


def _at_most(most: int, name: str, value: Any) -> int:
    number = whole(name, value)
    if number > most:
        raise _refused(name, value, f"{most} at most")
    return number


def flag(name: str, value: Any) -> bool:
    """Check an option that is either on or off.

    Raises:
        LocalProtocolError: it is neither True nor False.
    """
    if not isinstance(value, _FLAGS):
        raise _refused(name, value, "True or False")
    return bool(value)


def channel_name(_name: str, value: Any) -> ChannelKind:
    """Check the name of a channel.

    Raises:
        LocalProtocolError: there is no channel of this name.
    """
    for kind in CHANNEL_KINDS:
        if isinstance(value, str) and value == kind:
            return kind
    raise LocalProtocolError(f"there is no channel {_shown(value)}; there are: {', '.join(CHANNEL_KINDS)}")


def channel_names(name: str, value: Any) -> tuple[ChannelKind, ...]:
    """Check the channels that a server offers, at least one.

    Raises:
        LocalProtocolError: it is not a list of channels.
    """
    if isinstance(value, str) or not isinstance(value, (Sequence, set, frozenset)) or not value:
        raise _refused(name, value, "a list of one or more of: " + ", ".join(CHANNEL_KINDS))
    wanted = [channel_name(name, one) for one in value]
    return tuple(kind for kind in CHANNEL_KINDS if kind in wanted)


def cuda_device(name: str, value: Any) -> int | None:
    """Check the device that a server computes on: None or "cpu", "cuda", "cuda:N" or a ``torch.device``.

    Returns:
        The number of the GPU, or None.

    Raises:
        LocalProtocolError: it is none of these.
    """
    text = "cpu" if value is None else str(value) if isinstance(value, (str, torch.device)) else ""
    found = _GPU.fullmatch(text)
    if found is None and text != "cpu":
        raise _refused(name, value, 'None, "cpu", or a GPU such as "cuda:0"')
    return None if found is None else int(found[1] or 0)


def seconds_or_as_it_pays(name: str, value: Any) -> float | None:
    """Check how long to poll; None for as long as that pays; raises as ``seconds``."""
    return None if value is None else seconds(name, value)


def patience_of(spin_us: float | None) -> Patience:
    """What decides how long a wait polls, for this option."""
    return Patience(None if spin_us is None else spin_us * 1e-6)


@dataclass(frozen=True)
class ClientOptions:
    """A client's checked options. Names end in their units; an infinite time means no limit."""

    channel: ChannelKind = "zmq"
    spin_us: float | None = None
    arena_bytes: int = DEFAULT_ARENA_BYTES
    reply_arena_bytes: int = DEFAULT_ARENA_BYTES
    timeout_s: float = 60.0
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    snapshot: bool = False
    prefault: bool = False
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    device: int | None = None

    _CHECKS: ClassVar[dict[str, Callable[[str, Any], Any]]] = {
        "channel": channel_name,
        "spin_us": seconds_or_as_it_pays,
        "arena_bytes": whole,
        "reply_arena_bytes": whole,
        "timeout_s": seconds_or_no_limit,
        "connect_timeout_s": seconds_or_no_limit,
        "snapshot": flag,
        "prefault": flag,
        "max_message_bytes": message_bytes,
        "device": cuda_device,
    }

    @classmethod
    def checked(cls, *, reply_arena_bytes: Any = None, **given: Any) -> ClientOptions:
        """Check the options that a user gave, each by its name; see ``Client``.

        Raises:
            LocalProtocolError: an option is invalid, or two conflict.
        """
        if reply_arena_bytes is None:
            reply_arena_bytes = given["arena_bytes"]
        options = cls(**_checked(cls._CHECKS, reply_arena_bytes=reply_arena_bytes, **given))
        if options.spin_us and options.channel == "zmq":
            raise LocalProtocolError(
                f"spin_us={options.spin_us:g}: only the doorbell channel can spin before it blocks: "
                "use channel='doorbell', or leave it out"
            )
        return options


@dataclass(frozen=True)
class ServerOptions:
    """A server's checked options. Names end in their units; an infinite time means no limit.

    ``total_source`` tells users where ``max_total_arena_bytes`` comes from.
    """

    max_arena_bytes: int
    max_total_arena_bytes: int
    max_clients: int
    max_message_bytes: int
    channels: tuple[ChannelKind, ...] = CHANNEL_KINDS
    spin_us: float | None = None
    claim_timeout_s: float = 0.0
    drain_timeout_s: float = 5.0
    prefault: bool = False
    threads: int = 1
    device: int | None = None
    debug: bool = False
    total_source: str = "set by its owner"
    handshake_timeout_s: float = 10.0

    _CHECKS: ClassVar[dict[str, Callable[[str, Any], Any]]] = {
        "max_arena_bytes": whole,
        "max_total_arena_bytes": whole,
        "max_clients": whole,
        "max_message_bytes": message_bytes,
        "channels": channel_names,
        "spin_us": seconds_or_as_it_pays,
        "claim_timeout_s": seconds,
        "drain_timeout_s": seconds_or_no_limit,
        "prefault": flag,
        "threads": thread_count,
        "device": cuda_device,
        "debug": flag,
    }

    @classmethod
    def checked(cls, *, max_total_arena_bytes: Any = None, **given: Any) -> ServerOptions:
        """Check the options that a user gave, each by its name; see ``Server``.

        Raises:
            LocalProtocolError: an option is invalid.
            SegmentError: there is no /dev/shm.
        """
        if max_total_arena_bytes is not None:
            return cls(**_checked(cls._CHECKS, max_total_arena_bytes=max_total_arena_bytes, **given))
        half = shared_memory_room().total_bytes // 2
        known = _checked(cls._CHECKS, max_total_arena_bytes=half, **given)
        return cls(**known, total_source="half of /dev/shm")


def _checked(checks: dict[str, Callable[[str, Any], Any]], **given: Any) -> dict[str, Any]:
    return {name: checks[name](name, value) for name, value in given.items()}


def _number(name: str, value: Any, wanted: str) -> Any:
    """Check that a value is a number, which may be infinite."""
    if isinstance(value, _FLAGS) or not isinstance(value, Real) or value != value:
        raise _refused(name, value, wanted)
    return value


def _refused(name: str, value: Any, wanted: str) -> LocalProtocolError:
    return LocalProtocolError(f"{name}={_shown(value)}: it must be {wanted}")


def _shown(value: Any) -> str:
    """Show any value in one short line."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - the repr of what was passed by mistake may raise anything
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:59]}…"
