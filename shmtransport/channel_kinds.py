"""The names of the channels; imports nothing heavy, so that a command line can check an option at once."""

from __future__ import annotations

from typing import Literal, get_args

ChannelKind = Literal["zmq", "doorbell"]
CHANNEL_KINDS: tuple[ChannelKind, ...] = get_args(ChannelKind)
