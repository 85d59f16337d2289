"""``shmtransport doctor``, ``ls`` and ``clean``: what they print, and that no error is a traceback."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shmtransport import Client, __main__
from shmtransport.diagnostics import cli, doctor, facts, measure
from shmtransport.endpoints.options import CONNECT_TIMEOUT_S
from shmtransport.memory.leftovers import SharedObject
from shmtransport.version import VERSION
from tests.support.helpers import MIB, Serve, echo
from tests.support.process import ROOT, Process

pytestmark = pytest.mark.timeout(90)

Spawn = Callable[..., Process]
SERVER = ROOT / "tests/support/processes/server.py"


@pytest.fixture
def run() -> Callable[..., Any]:
    """Run the command line in this process."""
    return lambda *arguments: CliRunner().invoke(cli.app, arguments)


def is_one_line_error(done: Any, *parts: str) -> bool:
    return (
        done.exit_code == 2
        and done.stdout == ""
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
        and all(part in done.stderr for part in parts)
    )


# Errors


def test_nobody_listens(directory: Path, run: Callable[..., Any]) -> None:
    """No file, a file that is no socket, a dead server's socket: each said at once, without waiting."""
    (directory / "file").write_text("")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "dead"))
    started = time.perf_counter()
    assert is_one_line_error(run("doctor", f"ipc://{directory}/none"), "no process listens at", "No such file")
    assert is_one_line_error(run("doctor", f"ipc://{directory}/file"), "no process listens at", "no socket")
    assert is_one_line_error(run("doctor", f"ipc://{directory}/dead"), "no process listens at", "dead server")
    assert is_one_line_error(run("doctor", "--json", f"ipc://{directory}/none"), "no process listens at")
    assert time.perf_counter() - started < CONNECT_TIMEOUT_S / 2  # not one of the four has waited
    (directory / "dead").unlink()


@pytest.mark.parametrize("address", ["nonsense", "ipc://relative", "tcp://192.0.2.1:5", "tcp://127.0.0.1"])
def test_an_address_that_can_not_be_is_one_line(address: str, run: Callable[..., Any]) -> None:
    """It is quoted."""
    assert is_one_line_error(run("doctor", address), address)


def test_a_server_that_takes_no_client_says_why(serve: Serve, address: str, run: Callable[..., Any]) -> None:
    """Its refusal, in one line."""
    serve({"max_clients": 1})
    with Client(address, arena_bytes=4096):
        assert is_one_line_error(run("doctor", address), "max_clients is 1")


def test_a_server_of_an_older_version_is_one_line(
    serve: Serve, address: str, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    """One that does not know the methods that are called."""
    monkeypatch.setattr("shmtransport.endpoints.handlers.built_in", lambda _name, _server: None)
    serve(echo=echo)
    assert is_one_line_error(run("doctor", address), "of a version that can't be measured")


def test_ctrl_c_is_one_word(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 130, as of any program."""

    def interrupted(_address: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    done = run("doctor")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "interrupted\n")


# What is printed


@pytest.mark.usefixtures("hasty")
def test_the_printed_report(
    spawn: Spawn, address: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machine, server, a row a size, and the verdicts in words."""
    process = spawn(SERVER, address)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    done = run("doctor", address)
    assert done.exit_code == ("problem: " in done.stdout)
    words = " ".join(done.stdout.split())
    for part in ("machine", "server", "torch", "/dev/shm", "open files", "OMP_WAIT_POLICY=PASSIVE", "(ipc)"):
        assert part in words
    for part in ("64 bytes", "1.0 KiB", "16.0 KiB", "256.0 KiB", "4.0 MiB", "64.0 MiB", "spin 100", "in place"):
        assert part in words
    assert f"process {process.pid}" in words
    assert "mode 0600, in a directory of 0700" in words
    assert "hush" not in words
    assert "all is well" in words or "problem: " in words
    assert "Traceback" not in done.stderr


def test_the_machine_alone(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an address nothing is measured; a problem is told and has exit code 1."""
    whole = run("doctor")
    assert whole.exit_code == ("problem: " in whole.stdout)
    monkeypatch.setattr(facts, "shm_room", lambda: (64 * MIB, MIB))
    done = run("doctor")
    assert done.exit_code == 1
    assert "problem: /dev/shm has only 1.0 MiB free" in done.stdout
    assert "all is well" not in done.stdout
    as_json = run("doctor", "--json")
    assert as_json.exit_code == 1
    told = json.loads(as_json.stdout)
    assert (told["ok"], told["server"]) == (False, None)


def test_what_others_have_written_is_no_markup(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets in an address, a command line or a variable are printed as they are; limits may be unlimited."""
    monkeypatch.setenv("LD_PRELOAD", "[/red] [bold]")
    machine = replace(facts.machine_facts(), open_files=facts.Limit(None, None))
    times = (measure.ChannelTimes("zmq", 0.0, 1e-5, (measure.SizeTimes(64, 1e-5, 1e7, 1e-5, 1e7),)),)
    server = measure.ServerFacts("tcp://[::1]:5", "tcp", None, 9, "sh [/x] [red]", 1 << 20, 1e-4, 1e-4, times)
    monkeypatch.setattr(doctor, "examine", lambda _address: doctor.Facts(machine, server))
    done = run("doctor", "tcp://[::1]:5")
    assert done.exit_code == ("problem: " in done.stdout)
    for part in ("LD_PRELOAD=[/red] [bold]", "sh [/x] [red]", "tcp://[::1]:5", "unlimited (hard: unlimited)"):
        assert part in done.stdout


def test_ls_and_clean(owner_of_a_segment: Callable[[], tuple[Process, str]], run: Callable[..., Any]) -> None:
    """Living and dead are told apart; only the dead are removed, each by name."""
    living, living_name = owner_of_a_segment()
    killed, dead_name = owner_of_a_segment()
    killed.signal(signal.SIGKILL)
    killed.wait()
    listed = {one["name"]: one for one in json.loads(run("ls", "--json").stdout)["objects"]}
    assert (listed[living_name]["owner_pid"], listed[living_name]["dead"]) == (living.pid, False)
    assert (listed[dead_name]["owner_pid"], listed[dead_name]["dead"]) == (None, True)
    table = run("ls").stdout
    assert f"process {living.pid}" in table
    assert "dead" in table

    cleaned = run("clean")
    assert cleaned.exit_code == 0
    assert f"removed segment {dead_name} (" in cleaned.stdout
    assert living_name not in cleaned.stdout
    assert "of dead processes" in cleaned.stdout.splitlines()[-1]
    assert living_name in run("ls", "--json").stdout
    assert dead_name not in run("ls", "--json").stdout
    living.signal(signal.SIGKILL)
    living.wait()
    assert living_name in run("clean", "--json").stdout


@pytest.fixture
def owner_of_a_segment(directory: Path, spawn: Spawn) -> Callable[[], tuple[Process, str]]:
    """Start a process that has made a segment; the process and the name."""

    def start() -> tuple[Process, str]:
        script = directory / "owner.py"
        script.write_text(
            "import time\nfrom shmtransport.core.layout import Layout\n"
            "from shmtransport.memory.segment import Segment\n"
            "segment = Segment.create(Layout(data_bytes=4096, release_slots=8))\n"
            "print('ready', flush=True)\nprint(segment.name, flush=True)\ntime.sleep(60)\n"
        )
        process = spawn(script)
        return process, process.readline()

    return start


def test_where_there_is_nothing(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both commands say so."""
    monkeypatch.setattr("shmtransport.memory.named_object.DIRECTORY", "/no/such/directory")
    monkeypatch.setattr(cli, "connections", list)
    assert "this user has no named objects in /dev/shm" in run("ls").stdout
    assert "no connection of this user is in use" in run("ls").stdout
    assert run("clean").stdout == "dead processes have left nothing\n"
    assert json.loads(run("clean", "--json").stdout) == {"removed": []}
    assert json.loads(run("ls", "--json").stdout)["objects"] == []


@pytest.mark.parametrize(
    ("owners", "text"),
    [
        ([], "nothing"),
        ([7, 0], "2 of living processes"),
        ([None], "1 segment (4.0 KiB) of dead processes"),
        ([7, None], "1 of living processes, 1 segment (4.0 KiB) of dead processes"),
    ],
)
def test_living_and_dead_are_counted_apart(
    owners: list[int | None], text: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the doctor's table."""
    named = tuple(SharedObject("/x", 4096, owner, 1.0) for owner in owners)
    machine = replace(facts.machine_facts(), named=named)
    monkeypatch.setattr(doctor, "examine", lambda _address: doctor.Facts(machine))
    assert text in " ".join(re.sub("│", " ", run("doctor").stdout).split())


def test_an_owner_in_another_container_is_alive(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process id says nothing here, and is not shown."""
    monkeypatch.setattr("shmtransport.memory.leftovers.list_all", lambda: [SharedObject("/x", 4096, 0, 1.0)])
    assert "alive, elsewhere" in run("ls").stdout


# As a program


def test_the_program_measures_within_its_time(spawn: Spawn, address: str) -> None:
    """``python -m shmtransport doctor ADDRESS --json`` in full: exit code 0 and valid JSON within 15 s of measuring."""
    process = spawn(SERVER, address)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "shmtransport", "doctor", address, "--json"],
        env=Process.environment(),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    assert time.perf_counter() - started < 60  # with Python's and torch's own start, on a machine with other work
    told = json.loads(done.stdout)
    assert told["ok"] is (done.returncode == 0)
    assert told["server"]["server_pid"] == process.pid
    assert len(told["server"]["channels"]) == 3


def test_an_ascii_terminal_gets_replacements_and_no_escape_sequences() -> None:
    """What the environment, a process's name or a peer says is shown as text."""
    done = subprocess.run(
        [sys.executable, "-m", "shmtransport", "doctor"],
        env={**Process.environment(), "PYTHONIOENCODING": "ascii", "OMP_ODD": "\x1b[31m\u00fc", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (int("problem: " in done.stdout), "")
    assert "\\x1b[31m?" in done.stdout
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout


def test_the_version(run: Callable[..., Any]) -> None:
    """Before any command."""
    done = run("--version")
    assert (done.exit_code, done.stdout) == (0, f"shmtransport {VERSION}\n")


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("ls",), ("ls", "--json"), ("clean",)], ids=" ".join
)
def test_what_needs_no_torch_does_not_wait_for_it(arguments: tuple[str, ...]) -> None:
    """Importing torch takes seconds, numpy and zmq a tenth of one."""
    script = (
        "import sys, shmtransport.__main__\n"
        "try:\n    shmtransport.__main__.main()\n"
        "finally:\n    print({'torch', 'numpy', 'zmq'} & sys.modules.keys(), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=Process.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "set()\n")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_one_line_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback; exit code 2. `ls` needs rich only where there is a table to print."""
    monkeypatch.setattr(sys, "argv", ["shmtransport", "doctor"])
    ours = {"shmtransport.diagnostics.cli", "shmtransport.diagnostics.tables"}
    for name in [name for name in sys.modules if name.split(".")[0] == missing or name in ours]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as caught:
        __main__.main()
    assert caught.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == f"error: the command line needs {missing}: pip install 'shmtransport[cli]'\n"


def test_any_other_missing_module_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a mistake, and is seen."""
    monkeypatch.delitem(sys.modules, "shmtransport.diagnostics.cli")
    monkeypatch.setattr(sys, "argv", ["shmtransport", "ls"])
    monkeypatch.setitem(sys.modules, "shmtransport.diagnostics.connections", None)
    with pytest.raises(ModuleNotFoundError, match="connections"):
        __main__.main()
