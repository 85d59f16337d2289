"""The doctor's measurements: who listens at an address, how long its calls take, and what is left out and why."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shmtransport import Client, ConnectRefused, ConnectTimeout, Server
from shmtransport.channels.doorbell_server import DoorbellServerChannel
from shmtransport.diagnostics import doctor, facts, measure
from shmtransport.errors import OutOfResources
from tests.support.helpers import MIB, Serve
from tests.support.process import ROOT, Process

pytestmark = pytest.mark.timeout(90)

Spawn = Callable[..., Process]
SERVER = ROOT / "tests/support/processes/server.py"


# What is measured


@pytest.mark.usefixtures("hasty")
def test_all_channels_and_sizes_are_measured(spawn: Spawn, address: str, directory: Path) -> None:
    """Three kinds of channel, six sizes from 64 bytes to 64 MiB; the kernel confirms that the server listens."""
    process = spawn(SERVER, address)
    found = measure.measure(address)
    assert [(one.channel, one.spin_us) for one in found.channels] == [("zmq", 0), ("doorbell", 0), ("doorbell", 100)]
    assert (found.scheme, found.server_pid, found.arena_bytes) == ("ipc", process.pid, 64 * MIB)
    assert found.socket is not None
    assert (found.socket.listener_pid, found.socket.listener_uid) == (process.pid, os.geteuid())
    assert found.socket.path == f"{directory}/server.ipc"
    assert (found.socket.mode, found.socket.directory_mode) == (0o600, 0o700)
    assert 0 < found.second_touch_s_per_mib < 1
    for channel in found.channels:
        assert channel.error == ""
        assert 1e-6 < channel.round_trip_s < 1
        assert [size.nbytes for size in channel.sizes] == list(measure.SIZES)
        for size in channel.sizes:
            assert size.copied_bytes_per_s == pytest.approx(2 * size.nbytes / size.copied_s)
            assert size.in_place_bytes_per_s == pytest.approx(2 * size.nbytes / size.in_place_s)
        assert channel.sizes[-1].in_place_s < channel.sizes[-1].copied_s / 4, "in place means without copying"


@pytest.mark.usefixtures("hasty")
def test_a_server_that_grants_little_is_measured_with_that(serve: Serve, address: str) -> None:
    """The largest arenas that it grants are found, and larger tensors left out."""
    serve({"max_arena_bytes": MIB})
    found = measure.measure(address)
    assert found.arena_bytes == 256 * 1024
    assert [size.nbytes for size in found.channels[0].sizes] == [64, 1024, 16 * 1024, 256 * 1024]
    assert any("no more than 256.0 KiB" in str(one) for one in doctor.verdicts(doctor.examine(address)))


@pytest.mark.usefixtures("hasty")
def test_little_room_in_dev_shm_is_not_used_up(serve: Serve, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor asks for at most half of the free memory in total, but always for the smallest size."""
    serve()
    monkeypatch.setattr(measure, "shm_room", lambda: (1000 * MIB, 200 * MIB))
    assert measure.measure(address).arena_bytes == 4 * MIB
    monkeypatch.setattr(measure, "shm_room", lambda: (64 * MIB, 0))
    assert measure.measure(address).arena_bytes == 16 * 1024


def test_a_server_that_takes_no_client_says_why(serve: Serve, address: str) -> None:
    """Its refusal, whatever size is asked for."""
    serve({"max_clients": 1})
    with Client(address, arena_bytes=4096), pytest.raises(ConnectRefused, match="max_clients is 1"):
        measure.measure(address)


@pytest.mark.usefixtures("hasty")
def test_a_channel_that_fails_is_a_finding(serve: Serve, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are measured nevertheless."""

    def fail(_server: DoorbellServerChannel) -> None:
        raise OutOfResources("no thread to be had")

    refused = "the server refused: no thread to be had"
    monkeypatch.setattr(DoorbellServerChannel, "prepare", fail)
    serve()
    found = measure.measure(address)
    assert [one.error for one in found.channels] == ["", refused, refused]
    problems = [one for one in doctor.verdicts(doctor.Facts(facts.machine_facts(), found)) if one.level == "problem"]
    assert [one.remedy for one in problems if "can't be used" in one.finding] == 2 * [
        "the server refused: no thread to be had"
    ]


@pytest.mark.usefixtures("hasty")
def test_tcp_is_told_from_ipc() -> None:
    """There is no socket file; the process is known all the same, and the verdict says what to expect."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        tcp = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    server = Server(tcp)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        examined = doctor.examine(tcp)
    finally:
        server.stop()
        thread.join()
        server.close()
    assert examined.server is not None
    assert (examined.server.scheme, examined.server.socket) == ("tcp", None)
    assert examined.server.server_pid == os.getpid()
    assert any("this is tcp" in one.finding for one in doctor.verdicts(examined))


# No answer


def test_a_server_that_does_not_answer_is_named_with_its_state(spawn: Spawn, address: str) -> None:
    """A stopped server is reported as stopped; another program that listens is named."""
    process = spawn(SERVER, address)
    process.signal(signal.SIGSTOP)
    try:
        with pytest.raises(ConnectTimeout, match=rf"process {process.pid} \(.+\) listens .+ it is stopped"):
            measure.measure(address, connect_timeout_s=0.3)
    finally:
        process.signal(signal.SIGCONT)


def test_a_server_with_too_many_waiting_is_waited_for(directory: Path) -> None:
    """Nothing accepts, so the doctor can't tell who listens; it can tell that no one answers."""
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as first:
        full.bind(str(directory / "full"))
        full.listen(0)
        first.connect(str(directory / "full"))
        assert measure.socket_facts(f"ipc://{directory}/full").listener_pid == 0
        with pytest.raises(ConnectTimeout, match="no server answered"):
            measure.measure(f"ipc://{directory}/full", connect_timeout_s=0.3)


def test_another_program_that_listens_is_named(directory: Path) -> None:
    """The error gives its process and command line, and warns that it may be no server of this package."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(directory / "other"))
        other.listen()
        program = Path("/proc/self/cmdline").read_text().split("\0")[0]
        with pytest.raises(ConnectTimeout, match=rf"process {os.getpid()} \({re.escape(program)} .*another program"):
            measure.measure(f"ipc://{directory}/other", connect_timeout_s=0.3)


def test_a_command_line_can_not_play_tricks_on_the_terminal(directory: Path, spawn: Spawn) -> None:
    """It is another process's own text: escape sequences and line ends are shown as question marks."""
    script = directory / "trickster.py"
    script.write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen([sys.executable, script, "\x1b[2J\n", "ü"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        found = measure.command_of(process.pid)
        process.kill()
    assert found.endswith("?[2J? ü")


def test_long_command_lines_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without one, or that has gone, has an empty one."""
    assert len(measure.command_of(os.getpid())) <= 200
    assert measure.command_of(2**22 + 1) == ""
    monkeypatch.setattr(measure, "_COMMAND_CHARACTERS", 5)
    assert measure.command_of(os.getpid()).endswith("…")
    assert len(measure.command_of(os.getpid())) == 5


# The machine


def test_the_machines_facts_are_those_of_the_system() -> None:
    """Compared with what other means say."""
    machine = facts.machine_facts()
    assert machine.versions["torch"] == torch.__version__
    assert machine.versions["numpy"] == np.__version__
    assert "unknown" not in machine.versions.values()
    room = os.statvfs("/dev/shm")
    assert machine.shm_bytes == room.f_blocks * room.f_frsize
    assert machine.cores == len(os.sched_getaffinity(0))
    assert os.uname().release in machine.kernel
    assert machine.open_files.soft == os.sysconf("SC_OPEN_MAX")


def test_what_the_system_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of the kernel's is needed."""

    def missing(*_arguments: Any, **_keywords: Any) -> Any:
        raise FileNotFoundError(2, "No such file")

    monkeypatch.setattr("builtins.open", missing)
    monkeypatch.setattr(os, "statvfs", missing)
    machine = facts.machine_facts()
    assert machine.huge_pages == "unknown, /dev/shm: unknown"
    assert (machine.shm_bytes, machine.connected.count) == (0, 0)
    assert facts._version_of("no-such-package") == "unknown"
