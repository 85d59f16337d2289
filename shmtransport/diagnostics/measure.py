"""Measures a server: which process listens, and how long calls take on each channel.

It calls only the methods that every server has (``endpoints.built_in``), so it works against any server.
For up to 15 seconds it generates a heavy load.
"""

from __future__ import annotations

import os
import socket
import stat
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..channels import address as addresses
from ..channels.credentials import process_at
from ..endpoints.built_in import ECHO, PROBE
from ..endpoints.client import Client
from ..endpoints.device_sharing import NO_GPU, OFFER
from ..errors import ConnectRefused, ConnectTimeout, LocalProtocolError, SegmentError, TransportError
from ..protocol.messages import ChannelKind
from ..units import KIB, MIB
from .facts import shm_room

SIZES = (64, KIB, 16 * KIB, 256 * KIB, 4 * MIB, 64 * MIB)
SPIN_US = 100.0
_CHANNELS: tuple[tuple[ChannelKind, float], ...] = (("zmq", 0.0), ("doorbell", 0.0), ("doorbell", SPIN_US))
_ROUND_TRIP_SECONDS = 0.5
_SIZE_SECONDS = 0.12
_FEWEST_SAMPLES, _MOST_SAMPLES = 3, 2000
_TOUCHED_BYTES = 16 * MIB
_SMALLEST_ARENA = 16 * KIB
_CALL_TIMEOUT_S = 10.0
_COMMAND_CHARACTERS = 200


@dataclass(frozen=True)
class SocketFacts:
    """The socket file of an ipc address, and the process that listens there.

    The kernel names the process; its number is 0 if it can't be seen from here.
    """

    path: str
    mode: int
    directory_mode: int
    listener_pid: int
    listener_uid: int
    listener_command: str


@dataclass(frozen=True)
class SizeTimes:
    """Median times of a call with a tensor of ``nbytes`` each way, and the bandwidth both ways.

    Copied: both tensors lie outside the arenas, so each is copied once. In place: both lie in the arenas, and nothing
    is copied.
    """

    nbytes: int
    copied_s: float
    copied_bytes_per_s: float
    in_place_s: float
    in_place_bytes_per_s: float


@dataclass(frozen=True)
class ChannelTimes:
    """One channel's times.

    Attributes:
        channel: "zmq" or "doorbell".
        spin_us: how long the client polled before it blocked, in microseconds.
        round_trip_s: the median time of calls without tensors, in seconds.
        sizes: times by the size of the tensor.
        error: why the channel can't be used; then there are no times.
    """

    channel: ChannelKind
    spin_us: float
    round_trip_s: float = 0.0
    sizes: tuple[SizeTimes, ...] = ()
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.channel} channel" + (f" with spin_us={self.spin_us:g}" if self.spin_us else "")


@dataclass(frozen=True)
class ServerFacts:
    """A server as a client finds it.

    Attributes:
        address: the address that was examined.
        scheme: "ipc" or "tcp".
        socket: the socket file; None for tcp.
        server_pid: the process that answers.
        server_command: its command line.
        arena_bytes: the arena size that the server granted each way.
        first_touch_s_per_mib: the time to fill a MiB of a new arena, in seconds.
        second_touch_s_per_mib: the time to fill it once more.
        channels: the times of each channel.
        device: how tensors get to its GPU, in words.
        gpu: which GPU that is; empty if it has none.
    """

    address: str
    scheme: str
    socket: SocketFacts | None
    server_pid: int
    server_command: str
    arena_bytes: int
    first_touch_s_per_mib: float
    second_touch_s_per_mib: float
    channels: tuple[ChannelTimes, ...]
    device: str = NO_GPU
    gpu: str = ""


def measure(address: str, connect_timeout_s: float = 5.0) -> ServerFacts:
    """Examine and measure the server at ``address``.

    Raises:
        ConnectTimeout: no server answers there.
        ConnectRefused: the server takes no client now, not even with the smallest arenas.
        AddressError, SegmentError, PeerProtocolError, PeerDied, CallTimeout, LocalProtocolError: it can't be measured.
    """
    scheme = addresses.check_connect(address)
    listening = socket_facts(address) if scheme == "ipc" else None
    try:
        client, arena_bytes = _connect(address, "zmq", 0.0, connect_timeout_s)
    except ConnectTimeout as error:
        if listening is None or listening.listener_pid <= 0:
            raise
        raise ConnectTimeout(
            f"process {listening.listener_pid} ({listening.listener_command}) listens at {address} but did not answer "
            f"within {connect_timeout_s:g} s: {_condition(listening.listener_pid)}"
        ) from error
    with client:
        try:
            client.call(ECHO)
        except LocalProtocolError as error:
            raise LocalProtocolError(f"the server at {address} is of a version that can't be measured") from error
        first_s, second_s = _touch(client, min(arena_bytes, _TOUCHED_BYTES))
        channels = [_measure_channel(client, 0.0, arena_bytes)]
        pid = client.server_pid
        device, gpu = _device_of(client)
    channels += [_measure_other(address, channel, spin_us, connect_timeout_s) for channel, spin_us in _CHANNELS[1:]]
    return ServerFacts(
        address, scheme, listening, pid, command_of(pid), arena_bytes, first_s, second_s, tuple(channels), device, gpu
    )


def _device_of(client: Client) -> tuple[str, str]:
    """Return how tensors get to a server's GPU, and which GPU that is."""
    device = str(client.health().get("device", NO_GPU))
    if device == NO_GPU:
        return device, ""
    return device, bytes(client.call(OFFER)["gpu"]).hex()


def socket_facts(address: str) -> SocketFacts:
    """Examine the socket file of an ipc address, and find the process that listens there.

    Raises:
        ConnectTimeout: there is no socket file, or no process listens at it, so waiting is useless.
    """
    path = address[len(addresses.IPC) :]
    try:
        mode, directory_mode = os.stat(path).st_mode, os.stat(os.path.dirname(path)).st_mode
    except OSError as error:
        raise ConnectTimeout(
            f"no process listens at {address}: {error.strerror}: start a server, or check the address"
        ) from error
    if not stat.S_ISSOCK(mode):
        raise ConnectTimeout(f"no process listens at {address}: it is no socket: check the address")
    pid = uid = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
            pid, uid = process_at(probe)
        except ConnectionRefusedError as error:
            raise ConnectTimeout(
                f"no process listens at {address}: a dead server has left its socket file: start a server"
            ) from error
        except OSError:  # its backlog is full, or it may not be opened: connecting will tell
            pass
    return SocketFacts(path, stat.S_IMODE(mode), stat.S_IMODE(directory_mode), pid, uid, command_of(pid))


def command_of(pid: int) -> str:
    """Return a process's command line in printable characters; empty if it can't be seen."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4 * _COMMAND_CHARACTERS).rstrip(b"\0").split(b"\0")
    except OSError:
        return ""
    text = " ".join(word.decode(errors="replace") for word in words)
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= _COMMAND_CHARACTERS else text[: _COMMAND_CHARACTERS - 1] + "…"


def _condition(pid: int) -> str:
    """Say why a process may not answer, by its state."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "it has ended since"
    if state in "Tt":
        return "it is stopped: continue it (kill -CONT)"
    return "it is busy with a long call, still starting, or another program"


def _connect(address: str, channel: ChannelKind, spin_us: float, timeout_s: float) -> tuple[Client, int]:
    """Connect with the largest arenas that both sides have room for; return their size as well."""
    _, free = shm_room()
    sizes = [size for size in reversed(SIZES) if size >= _SMALLEST_ARENA]
    sizes = [size for size in sizes if size * 4 <= free] or sizes[-1:]
    for size in sizes[:-1]:
        try:
            return _client(address, channel, spin_us, timeout_s, size), size
        except (ConnectRefused, SegmentError):  # noqa: PERF203 - this loop looks for the server's limit
            continue
    return _client(address, channel, spin_us, timeout_s, sizes[-1]), sizes[-1]


def _client(address: str, channel: ChannelKind, spin_us: float, timeout_s: float, arena_bytes: int) -> Client:
    return Client(
        address,
        channel=channel,
        spin_us=spin_us,
        arena_bytes=arena_bytes,
        timeout_s=_CALL_TIMEOUT_S,
        connect_timeout_s=timeout_s,
    )


def _touch(client: Client, nbytes: int) -> tuple[float, float]:
    """Measure the seconds per MiB to fill part of a new arena, the first and the second time."""
    loan = client.empty((nbytes,), torch.uint8)
    times = []
    for value in range(2):
        started = time.perf_counter()
        loan.fill_(value)
        times.append((time.perf_counter() - started) / (nbytes / MIB))
    return times[0], times[1]


def _measure_channel(client: Client, spin_us: float, arena_bytes: int) -> ChannelTimes:
    round_trip_s = _median(lambda: client.call(ECHO), _ROUND_TRIP_SECONDS)
    sizes = tuple(_measure_size(client, nbytes) for nbytes in SIZES if nbytes <= arena_bytes)
    return ChannelTimes(client.channel, spin_us, round_trip_s, sizes)


def _measure_other(address: str, channel: ChannelKind, spin_us: float, connect_timeout_s: float) -> ChannelTimes:
    """Measure a channel over its own connection; one that fails is a finding, not an error."""
    try:
        client, arena_bytes = _connect(address, channel, spin_us, connect_timeout_s)
        with client:
            return _measure_channel(client, spin_us, arena_bytes)
    except TransportError as error:
        return ChannelTimes(channel, spin_us, error=str(error))


def _measure_size(client: Client, nbytes: int) -> SizeTimes:
    outside = torch.zeros(nbytes, dtype=torch.uint8)
    copied_s = _median(lambda: client.call(ECHO, outside), _SIZE_SECONDS)
    inside = client.empty((nbytes,), torch.uint8)
    in_place_s = _median(lambda: client.call(PROBE, nbytes, inside), _SIZE_SECONDS)
    return SizeTimes(nbytes, copied_s, 2 * nbytes / copied_s, in_place_s, 2 * nbytes / in_place_s)


def _median(call: Callable[[], object], seconds: float) -> float:
    """Return the median time of a call, after one that is not counted."""
    call()
    samples: list[float] = []
    started = ended = time.perf_counter()
    while len(samples) < _FEWEST_SAMPLES or (ended - started < seconds and len(samples) < _MOST_SAMPLES):
        before = time.perf_counter()
        call()
        ended = time.perf_counter()
        samples.append(ended - before)
    return statistics.median(samples)
