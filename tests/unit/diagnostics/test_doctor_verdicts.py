"""What the doctor says: each finding, with its remedy, from facts that are made up."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from shmtransport.diagnostics.doctor import Facts, Verdict, has_problem, report, verdicts
from shmtransport.diagnostics.facts import ConnectedSegments, Limit, MachineFacts, environment
from shmtransport.diagnostics.gpus import GpuFacts
from shmtransport.diagnostics.measure import SIZES, ChannelTimes, ServerFacts, SizeTimes, SocketFacts
from shmtransport.memory.leftovers import SharedObject
from shmtransport.units import MIB, time_text

GIB = 1 << 30
US = 1e-6

MACHINE = MachineFacts(
    versions={"shmtransport": "1.0"},
    kernel="Linux",
    cores=8,
    shm_bytes=32 * GIB,
    shm_free_bytes=16 * GIB,
    connected=ConnectedSegments(0, 0, ()),
    named=(),
    open_files=Limit(1024, None),
    locked_memory_bytes=Limit(None, None),
    environment={},
    huge_pages="never, /dev/shm: never",
    core="python: it is the default",
    guarded=True,
)
SOCKET = SocketFacts("/run/me/server.ipc", 0o600, 0o700, 77, os.geteuid(), "python server.py")


def size_times(nbytes: int, *, copied_s: float) -> SizeTimes:
    return SizeTimes(nbytes, copied_s, 2 * nbytes / copied_s, 20 * US, 2 * nbytes / (20 * US))


TIMES = tuple(size_times(nbytes, copied_s=20 * US + nbytes / 10e9) for nbytes in SIZES)
FAST = ChannelTimes("zmq", 0.0, 30 * US, TIMES)
SERVER = ServerFacts(
    address="ipc:///run/me/server.ipc",
    scheme="ipc",
    socket=SOCKET,
    server_pid=77,
    server_command="python server.py",
    arena_bytes=64 * MIB,
    first_touch_s_per_mib=100 * US,
    second_touch_s_per_mib=90 * US,
    channels=(FAST, ChannelTimes("doorbell", 0.0, 29 * US, TIMES), ChannelTimes("doorbell", 100.0, 28 * US, TIMES)),
)


def of_machine(**changes: object) -> list[Verdict]:
    return verdicts(Facts(replace(MACHINE, **changes)))  # type: ignore[arg-type]


def of_server(machine: MachineFacts = MACHINE, **changes: object) -> list[Verdict]:
    return verdicts(Facts(machine, replace(SERVER, **changes)))  # type: ignore[arg-type]


def with_round_trips(*microseconds: float) -> tuple[ChannelTimes, ...]:
    return tuple(replace(one, round_trip_s=trip * US) for one, trip in zip(SERVER.channels, microseconds, strict=True))


def only(found: list[Verdict], level: str, *parts: str) -> None:
    """There is one verdict, of this level, and its words contain these parts."""
    assert len(found) == 1, found
    assert found[0].level == level
    for part in parts:
        assert part in str(found[0])


def test_where_nothing_is_wrong_nothing_is_said() -> None:
    """No verdict at all, with and without a server."""
    assert of_machine() == []
    assert of_server() == []


# The machine


def test_a_small_dev_shm() -> None:
    """What is free counts, not the whole; the remedy names docker's option too."""
    only(of_machine(shm_free_bytes=60 * MIB), "problem", "only 60.0 MiB free of 32768.0 MiB", "--shm-size")
    assert of_machine(shm_free_bytes=256 * MIB) == []


def test_no_dev_shm() -> None:
    """Without it nothing works."""
    only(of_machine(shm_bytes=0, shm_free_bytes=0), "problem", "no /dev/shm", "mount")


def test_leftovers_of_dead_processes() -> None:
    """How many and how much; what the living have is no finding."""
    dead = SharedObject("/a", 3 * MIB, None, 9.0)
    living = [replace(dead, owner_pid=pid) for pid in (1234, 0, -1)]
    only(of_machine(named=(dead, *living, dead)), "problem", "2 segments (6.0 MiB)", "shmtransport clean")
    assert of_machine(named=tuple(living)) == []


@pytest.mark.parametrize(("soft", "low"), [(256, True), (483, True), (484, False), (None, False)])
def test_the_open_file_limit(soft: int | None, low: bool) -> None:
    """Low is what does not do for as many clients as a server takes by default; unlimited is not low."""
    found = of_machine(open_files=Limit(soft, None))
    if low:
        only(found, "problem", f"open-file limit of {soft} is low for 64 clients", "ulimit -n 484")
    else:
        assert found == []


# The address


def test_tcp() -> None:
    """It works, at twice the time."""
    only(of_server(scheme="tcp", socket=None), "advice", "this is tcp", "ipc://")


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_directory_that_others_can_write(mode: int) -> None:
    """They could put their own server there, but not under the sticky bit."""
    found = of_server(socket=replace(SOCKET, directory_mode=mode))
    only(found, "problem", "/run/me is writable by others", "chmod 700 /run/me")
    assert of_server(socket=replace(SOCKET, directory_mode=mode | 0o1000)) == []


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_socket_that_others_can_connect_to(mode: int) -> None:
    """Write permission is what connecting needs."""
    only(of_server(socket=replace(SOCKET, mode=mode)), "problem", "other users may connect", "chmod 600")
    assert of_server(socket=replace(SOCKET, mode=0o644)) == []


def test_another_users_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's and one's own are as expected; one that can't be seen is no finding."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    found = of_server(socket=replace(SOCKET, listener_uid=54321))
    only(found, "problem", "process 77 of user 54321", "make sure")
    for uid in (0, 1000):
        assert of_server(socket=replace(SOCKET, listener_uid=uid)) == []
    assert of_server(socket=replace(SOCKET, listener_uid=54321, listener_pid=0)) == []


def test_one_listens_and_another_answers() -> None:
    """Something forwards the messages."""
    only(of_server(server_pid=88), "problem", "process 77 listens", "process 88")
    assert of_server(server_pid=0) == []
    assert of_server(socket=replace(SOCKET, listener_pid=0)) == []


def test_an_environment_variable_that_names_another_address() -> None:
    """It can't switch what is measured, but a program may take its address from there; whatever its name."""
    there = replace(MACHINE, environment={"APP_WORKER": "ipc:///elsewhere", "TMPDIR": "/scratch"})
    here = replace(MACHINE, environment={"APP_WORKER": SERVER.address})
    only(of_server(there), "advice", "APP_WORKER is ipc:///elsewhere", "unset")
    assert of_server(here) == []
    assert verdicts(Facts(there)) == []


# The measurements


def test_a_channel_that_would_take_much_less_time() -> None:
    """The fastest is named with its figures and how to get it; the default is compared, not the slowest."""
    found = of_server(channels=with_round_trips(110, 70, 12))
    only(found, "advice", "takes 110 µs on the zmq channel", "must be woken", "spin_us=100 took 12 µs", "core")
    found = of_server(channels=with_round_trips(110, 40, 45))
    only(found, "advice", "the doorbell channel took 40 µs", 'channel="doorbell"')
    assert "spin" not in str(found[0])


def test_a_channel_that_would_hardly_help_is_not_advised() -> None:
    """The gain must be at least a fifth; and where no side sleeps there is nothing to gain."""
    assert of_server(channels=with_round_trips(110, 100, 90)) == []
    assert of_server(channels=with_round_trips(39, 20, 10)) == []


def test_nobody_is_told_to_spin_on_one_core() -> None:
    """There the one that looks keeps the other from answering."""
    assert of_server(replace(MACHINE, cores=1), channels=with_round_trips(110, 100, 12)) == []


def test_a_slow_machine() -> None:
    """Even the fastest round trip takes long."""
    found = of_server(channels=with_round_trips(3000, 2900, 2800))
    only(found, "problem", "fastest round trip took 2.8 ms", "load")


def with_copies(copied_s: float, nbytes: int) -> tuple[ChannelTimes, ...]:
    """One size of one channel takes so long."""
    slow = tuple(size_times(nbytes, copied_s=copied_s) if size.nbytes == nbytes else size for size in TIMES)
    return (*SERVER.channels[:2], replace(SERVER.channels[2], sizes=slow))


def test_slow_copies() -> None:
    """The slowest of all sizes and channels; a small tensor's time is the call's and says nothing."""
    only(of_server(channels=with_copies(10e-3, 256 * 1024)), "problem", "256.0 KiB in and out took 10 ms, 0.05 GB/s")
    assert of_server(channels=with_copies(10e-3, 16 * 1024)) == []
    assert of_server(channels=with_copies(100e-3, 64 * MIB)) == []
    only(of_server(channels=with_copies(200e-3, 64 * MIB)), "problem", "64.0 MiB in and out took 200 ms, 0.67 GB/s")


def test_slow_copies_are_put_down_to_threads_that_spin_where_they_may() -> None:
    """Not where there is one thread, or where they sleep."""
    channels = with_copies(10e-3, 256 * 1024)
    only(of_server(channels=channels), "problem", "spinning on the same 8 cores", "OMP_WAIT_POLICY=PASSIVE")
    for variables in ({"OMP_WAIT_POLICY": "passive"}, {"OMP_NUM_THREADS": "1"}):
        found = of_server(replace(MACHINE, environment=variables), channels=channels)
        only(found, "problem", "look at the machine's load", "client.empty()")
        assert "spinning" not in str(found[0])


def test_a_channel_that_can_not_be_used() -> None:
    """Its error is the remedy's words; it takes no part in the comparison."""
    broken = ChannelTimes("doorbell", 0.0, error="it needs a thread")
    only(of_server(channels=(FAST, broken)), "problem", "the doorbell channel can't be used", "thread")


def test_pages_that_are_not_there_yet() -> None:
    """The difference between first and second touch, a MiB and in all."""
    found = of_server(first_touch_s_per_mib=1100 * US, second_touch_s_per_mib=100 * US)
    only(found, "advice", "1 ms longer", "64.0 MiB 64 ms", "prefault=True")
    assert of_server(first_touch_s_per_mib=100 * US, second_touch_s_per_mib=100 * US) == []


def test_small_arenas() -> None:
    """What the server would not grant was not measured."""
    only(of_server(arena_bytes=4 * MIB), "advice", "no more than 4.0 MiB", "max_arena_bytes")


def test_problems_come_first() -> None:
    """Then advice, each in the order in which it was found."""
    found = verdicts(Facts(replace(MACHINE, open_files=Limit(10, 10)), replace(SERVER, scheme="tcp", arena_bytes=MIB)))
    assert [verdict.level for verdict in found] == ["problem", "advice", "advice"]
    assert "tcp" in found[1].finding


# What is told


def test_segments_without_guards_are_named() -> None:
    """What a peer could do, and what helps."""
    only(of_machine(guarded=False), "advice", "SIGBUS", "C compiler", "SHMTRANSPORT_SIGBUS")


def test_the_report_is_json_with_the_verdicts() -> None:
    """All facts and verdicts, and whether there is a problem."""
    facts = Facts(replace(MACHINE, shm_free_bytes=0), SERVER)
    told = json.loads(json.dumps(report(facts)))
    assert told["ok"] is False
    assert told["verdicts"][0]["level"] == "problem"
    assert told["verdicts"][0].keys() == {"level", "finding", "remedy"}
    assert told["machine"]["shm_bytes"] == 32 * GIB
    assert told["server"]["channels"][2]["spin_us"] == 100
    assert told["server"]["channels"][0]["sizes"][1]["nbytes"] == 1024
    assert report(Facts(MACHINE))["ok"] is True
    assert report(Facts(MACHINE))["server"] is None


def test_advice_alone_is_no_problem() -> None:
    """All is well, if not as fast as it could be."""
    assert not has_problem([])
    assert not has_problem([Verdict("advice", "a", "b")])
    assert has_problem([Verdict("advice", "a", "b"), Verdict("problem", "a", "b")])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 µs"),
        (1.234e-6, "1.23 µs"),
        (999.4e-6, "999 µs"),
        (999.9e-6, "1 ms"),
        (0.0123, "12.3 ms"),
        (2.5, "2.5 s"),
    ],
)
def test_times_have_three_digits_and_a_unit(seconds: float, text: str) -> None:
    """Never 1e+03 µs."""
    assert time_text(seconds) == text


def test_only_variables_that_matter_are_reported() -> None:
    """By name, or since the value is an ipc address, so that a report gives no secret away."""
    found = environment(
        {
            "OMP_NUM_THREADS": "1",
            "APP_WORKER": "ipc:///x",
            "APP_KEY": "secret",
            "TMPDIR": "/scratch",
            "HOME": "/root",
            "AWS_SECRET": "secret",
            "KMP_BLOCKTIME": "0",
        }
    )
    assert list(found) == ["APP_WORKER", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "TMPDIR"]


# GPUs

GPU = GpuFacts(0, "a GPU", "ab12", "", "")


def test_a_gpu_that_can_do_everything_needs_no_advice() -> None:
    """Arenas can be pinned and shared, and the server uses the same GPU."""
    machine = replace(MACHINE, gpus=(GPU,))
    assert of_machine(gpus=(GPU,)) == []
    assert of_server(machine, device="pinned", gpu="ab12") == []


def test_why_a_gpu_is_slow_is_told() -> None:
    """What can't be pinned or shared is told with the driver's reason, and so is torch's way of allocating."""
    only(of_machine(gpus=(replace(GPU, not_pinned="ERROR_801"),)), "advice", "cuda:0", "ERROR_801", "ulimit -l")
    only(of_machine(gpus=(replace(GPU, not_shared="ERROR_801"),)), "advice", "cuda:0", "ERROR_801", "pinned arenas")
    expandable = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    only(of_machine(gpus=(GPU,), environment=expandable), "advice", "expandable segments", "empty(")
    assert of_machine(environment=expandable) == []


def test_why_a_servers_gpu_is_slow_is_told() -> None:
    """A failed registration, another GPU, and another PID namespace each have a remedy."""
    machine = replace(MACHINE, gpus=(GPU,))
    only(of_server(machine, device="not pinned: ERROR_801", gpu="ab12"), "advice", "ERROR_801", "ulimit -l")
    only(of_server(machine, device="pinned", gpu="cd34"), "advice", "cd34", "CUDA_VISIBLE_DEVICES")
    only(of_server(machine, device="pinned", gpu="ab12", server_pid=0, socket=None), "advice", "PID namespace")
