"""How a command starts its own worker: what the worker imports, and where its socket is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llama_split.errors import WorkerFailed
from llama_split.placement.import_path import without_current_directory
from llama_split.placement.local import WorkerProcess, temporary_directory
from tests.support.commands import environment
from tests.support.process import ROOT

pytestmark = pytest.mark.timeout(150)

LONG = f"/tmp/{os.getpid():t>101}"  # 106 bytes, and another run's is another
PATH_BYTES = len("/llama-split-12345678/worker.ipc")


def lay_traps(directory: Path, *names: str) -> Path:
    """Make modules that write a file when imported; return that file."""
    trapped = directory / "trapped"
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"open({str(trapped)!r}, 'a').write(__file__ + '\\n')\n")
    return trapped


def test_a_worker_imports_nothing_from_the_current_directory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for an empty entry of PYTHONPATH; its socket gets a short path where TMPDIR's is too long.

    It ends in order, within the time that it is given before it is killed. Its threads spin as long as was asked for.
    """
    traps = ("tokenizers.py", "torch.py", "sitecustomize.py", "llama_split/__init__.py", "shmtransport/__init__.py")
    trapped = lay_traps(tmp_path, *traps)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("PYTHONPATH", f":{ROOT}:{tmp_path}:.")
    monkeypatch.setattr(tempfile, "tempdir", LONG)
    Path(LONG).mkdir(exist_ok=True)
    try:
        with WorkerProcess(["--model", str(tiny)], computes_alone=True) as worker:
            worker.wait_until_ready()
            assert b"GOMP_SPINCOUNT=100000" in Path(f"/proc/{worker._process.pid}/environ").read_bytes().split(b"\0")
            assert worker.address.startswith("ipc:///tmp/llama-split-")
        assert worker._process.returncode == 0
    finally:
        shutil.rmtree(LONG)
    assert not trapped.exists(), trapped.read_text()


def test_python_m_in_a_checkout_takes_the_packages_from_there_and_nothing_else(tmp_path: Path) -> None:
    """Whatever else lies beside them, though Python itself puts the current directory first."""
    for package in ("llama_split", "shmtransport"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    settings = tmp_path / "llama_split/commands/settings.py"
    settings.write_text(settings.read_text() + "MODEL_VARIABLE = 'OF_THIS_COPY'\n")
    trapped = lay_traps(tmp_path, "tokenizers.py", "torch.py", "typer.py")
    done = subprocess.run(
        [sys.executable, "-m", "llama_split", "info", "--random-weights"],
        cwd=tmp_path,
        env={**environment(), "OF_THIS_COPY": "llama-3.2-1b"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "OF_THIS_COPY=llama-3.2-1b" in done.stderr
    assert not trapped.exists(), trapped.read_text()


def test_entries_that_mean_the_current_directory_are_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any spelling: empty, relative, absolute, through a link."""
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    entries = ["/usr/lib", "", ".", "..", "../here", "/no/such", str(tmp_path / "here"), str(tmp_path / "link")]
    assert without_current_directory(os.pathsep.join(entries)) == "/usr/lib:..:/no/such"
    assert without_current_directory("") == ""


def test_a_socket_lies_where_temporary_files_go_if_its_path_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly up to 107 bytes."""
    monkeypatch.setattr(tempfile, "tempdir", LONG)
    assert temporary_directory(1) == LONG
    assert temporary_directory(2) == "/tmp"


def test_a_temporary_directory_that_is_no_text_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroMQ takes paths in UTF-8 only."""
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/\udcff")
    assert temporary_directory(PATH_BYTES) == "/tmp"


def test_without_any_usable_directory_the_error_names_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error gives the number of bytes that its path may have."""
    monkeypatch.setattr(tempfile, "tempdir", LONG)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(WorkerFailed, match=r"at most 75 bytes, and /tmp can't be written: set TMPDIR to another"):
        temporary_directory(PATH_BYTES)
