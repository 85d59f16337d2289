"""The quickstart and the guide are true: their Python runs, and prints what the comments beside it promise.

All Python of a page of the guide is one script, with its server in a thread. The quickstart's scripts are processes.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import llama_split
import shmtransport
from tests.support.documents import DOCS, assert_printed, python_of, run_page
from tests.support.process import Process

ADDRESS = "ipc:///tmp/guide.ipc"
PAGES = sorted(path.name for path in (DOCS / "guide").glob("*.md") if f'"{ADDRESS}"' in path.read_text())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # a page forks
@pytest.mark.usefixtures("default_arenas")
@pytest.mark.parametrize("page", PAGES)
def test_the_guides_code_prints_what_it_says(
    page: str, address: str, directory: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A page ends with everything closed; no thread of it is left."""
    caplog.set_level(logging.CRITICAL, logger="shmtransport")  # the pages raise errors on purpose
    code = python_of((DOCS / "guide" / page).read_text()).replace(ADDRESS, address)
    before = set(threading.enumerate())
    assert_printed(run_page(page, code, directory, capsys), code)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_every_page_with_python_is_run() -> None:
    """Those of the guide here; those of the split model and its server beside their tests, which have a worker."""
    with_python = {path.name for path in (DOCS / "guide").glob("*.md") if "```python" in path.read_text()}
    assert with_python == {*PAGES, "split-llama.md", "serving.md"}
    assert len(PAGES) >= 5


def test_the_quickstarts_scripts_print_what_they_say(
    spawn: Callable[..., Process], address: str, tmp_path: Path
) -> None:
    """The server, the client and the asyncio client, as three processes."""
    text = (DOCS / "quickstart.md").read_text()
    scripts = dict(re.findall(r"<!-- run: (\S+) -->\n```python\n(.*?)```", text, re.DOTALL))
    assert list(scripts) == ["server.py", "client.py", "async_client.py"]
    assert len(scripts) == text.count("```python")
    for name, code in scripts.items():
        (tmp_path / name).write_text(code)
    spawn(tmp_path / "server.py", address)
    for name in ("client.py", "async_client.py"):
        client = spawn(tmp_path / name, address, ready=False)
        assert_printed(client.output.read().splitlines(), scripts[name])
        assert client.wait() == 0


@pytest.mark.parametrize("package", [shmtransport, llama_split], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package: ModuleType) -> None:
    """What a package exports is on a page of the reference."""
    pages = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(rf"^::: ({package.__name__}\.\S+)$", pages, re.MULTILINE)}
    assert {name for name in package.__all__ if not name.startswith("__")} <= shown
