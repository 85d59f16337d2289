"""How ``llama-split`` starts and ends: nothing heavy is imported in vain, and nothing is waited for at the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shmtransport.version import VERSION
from tests.support.commands import Command, Finished, Running, environment

pytestmark = pytest.mark.timeout(150)

WATCHED = """
import atexit, sys
sys.modules.update(dict.fromkeys({forbidden!r}))
atexit.register(print, "teardown")
{before}
from llama_split.__main__ import main
sys.argv = ["llama-split", *sys.argv[1:]]
main()
"""


def watched(*arguments: str, forbidden: tuple[str, ...] = ("torch", "transformers"), before: str = "") -> Finished:
    """Run a command that fails if it imports what is forbidden, and tells whether Python ended in the usual way."""
    script = WATCHED.format(forbidden=forbidden, before=before)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment(COLUMNS="80"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Finished(done.returncode, done.stdout.removesuffix("teardown\n"), done.stderr)


WRONG = {
    "--mode": ("magic", "mode 'magic' is not supported; choose one of op, fused, layer, stack"),
    "--dtype": ("int8", "dtype int8 is not supported; choose one of float32, bfloat16, float16"),
    "--wire-dtype": ("int4", "dtype int4 is not supported; choose one of float32, bfloat16, float16"),
    "--channel": ("pigeon", "channel 'pigeon' is not supported; choose one of zmq, doorbell"),
    "--pipeline": ("9", "pipeline 9 is not supported; choose 1 to 8 chunks"),
    "--worker": ("nonsense", "'nonsense' is neither ipc:///absolute/path nor tcp://host:port"),
}
COMMANDS: dict[str, tuple[str, ...]] = {"info": ("info",), "generate": ("generate", "--prompt", "x"), "chat": ("chat",)}


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("info", option) for option in ("--mode", "--wire-dtype")),
        *(("generate", option) for option in ("--dtype", "--wire-dtype", "--channel", "--worker")),
        *(("chat", option) for option in ("--mode", "--dtype", "--channel", "--pipeline")),
    ],
)
def test_a_wrong_name_is_refused_before_anything_heavy_is_imported(command: str, option: str) -> None:
    """And before a worker is started."""
    value, reason = WRONG[option]
    assert watched(*COMMANDS[command], option, value) == (2, "", f"error: {reason}\n")


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (("--dtype", "int4"), "dtype int4 is not supported; choose one of float32, bfloat16, float16, int8"),
        (("--channels", "zmq,pigeon"), "channel 'pigeon' is not supported; choose one of zmq, doorbell"),
    ],
)
def test_a_worker_refuses_a_wrong_name_at_once(option: tuple[str, str], reason: str, tmp_path: Path) -> None:
    """Before it listens."""
    assert watched("worker", "--bind", f"ipc://{tmp_path}/w.ipc", *option) == (2, "", f"error: {reason}\n")


@pytest.mark.parametrize("command", [(), ("generate",), ("chat",), ("worker",), ("info",)], ids="".join)
def test_help_is_whole_at_80_columns(command: tuple[str, ...]) -> None:
    """Neither names nor sentences are cut, and no default contradicts its option."""
    done = watched(*command, "--help")
    assert (done.code, done.err) == (0, "")
    assert "…" not in done.out
    assert not re.search(r"[a-z]\.\.\.", done.out)
    assert "default: True" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    if command in (("generate",), ("chat",)):
        for name in ("--connect-timeout-s", "--no-reconnect", "$LLAMA_MODEL_PATH", "$LLAMA_IPC_PATH"):
            assert name in done.out
    if command == ("generate",):
        assert re.search(r"--chat / --no-chat.*default: chat\]", done.out, re.DOTALL)


def test_the_version() -> None:
    """Before any command."""
    assert watched("--version") == (0, f"llama-split {VERSION}\n", "")


@pytest.mark.parametrize(("code", "arguments"), [(0, ("info",)), (2, ("info", "--mode", "magic"))])
def test_a_process_that_has_torch_ends_without_its_teardown(code: int, arguments: tuple[str, ...]) -> None:
    """Which takes up to a second; all that was printed arrives, with the right exit code. Without torch, as usual."""
    quick = watched(*arguments, forbidden=(), before="import types; sys.modules['torch'] = types.ModuleType('torch')")
    usual = watched(*arguments, forbidden=(), before="atexit.register(print, 'usual')")
    assert quick.code == usual.code == code
    assert usual.out == f"{quick.out}usual\n"
    assert quick.err == usual.err


def test_output_that_is_not_read_is_an_error() -> None:
    """The reader has gone before the end."""
    script = WATCHED.format(forbidden=(), before="import types; sys.modules['torch'] = types.ModuleType('torch')")
    with subprocess.Popen(
        [sys.executable, "-c", script, "--version"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) != 0
        assert "Traceback" not in process.stderr.read()


# What a notice tells is followed by whether torch had been imported by then.
_NOTICES = """
from llama_split.commands import opening
tell = opening.notice
opening.notice = lambda text: tell(f"{text}, {'torch' in sys.modules}")
"""


@pytest.mark.parametrize("place", ["file", "socket", "port"])
def test_a_worker_that_is_not_there_is_told_at_once(place: str, tmp_path: Path) -> None:
    """Long before the wait for it is over, and before anything is imported; Ctrl-C ends the wait."""
    address = {"port": "tcp://127.0.0.1:1"}.get(place, f"ipc://{tmp_path}/w.ipc")
    if place == "socket":
        subprocess.run(
            [sys.executable, "-c", f"import socket; socket.socket(socket.AF_UNIX).bind('{tmp_path}/w.ipc')"], check=True
        )
    because = {"file": "there is no file", "socket": "its server has ended", "port": "no process listens at this port"}
    script = WATCHED.format(forbidden=(), before=_NOTICES)
    process = subprocess.Popen(
        [sys.executable, "-c", script, "generate", "--prompt", "x", "--worker", address],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith(f"no worker listens at {address} (")
    assert because[place] in line
    assert line.endswith("waiting up to 30 s for one to start, False\n")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    process.stderr.close()


def test_a_short_wait_is_not_announced(command: Command, tmp_path: Path) -> None:
    """Its error comes soon enough."""
    done = command(
        *("generate", "--prompt", "x", "--model", "/no/such/model", "--worker", f"ipc://{tmp_path}/w.ipc"),
        *("--connect-timeout-s", "0.5"),
    )
    assert "waiting" not in done.err


def test_a_worker_ends_soon_after_it_was_told_to(running: Callable[..., Running], tiny: Path, tmp_path: Path) -> None:
    """In order: its socket is gone, and the exit code is 0."""
    process = running("worker", "--bind", f"ipc://{tmp_path}/w.ipc", "--model", str(tiny))
    process.wait_until_ready()
    assert os.path.exists(tmp_path / "w.ipc")
    started = time.monotonic()
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert time.monotonic() - started < 10.0
    assert not os.path.exists(tmp_path / "w.ipc")


def test_a_worker_that_is_told_to_end_again_and_again_ends_in_order(
    running: Callable[..., Running], tiny: Path, tmp_path: Path
) -> None:
    """The kernel may do so for each thread of a parent that was killed: nothing interrupts the cleaning up."""
    process = running("worker", "--bind", f"ipc://{tmp_path}/w.ipc", "--model", str(tiny))
    process.wait_until_ready()
    deadline = time.monotonic() + 20.0
    while os.path.exists(tmp_path / "w.ipc") and time.monotonic() < deadline:
        try:
            process.signal(signal.SIGTERM)
        except ProcessLookupError:
            break
        time.sleep(0.0005)
    assert process.wait() == 0
    assert not os.path.exists(tmp_path / "w.ipc")
