"""What the documents say is what the code does: examples, the memory layout, the table of modes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from llama_split.operations import REVEALED, Mode
from shmtransport.layout import FORMAT_VERSION, HEADER, MAGIC, Layout
from tests.conftest import ROOT, Process

README = (ROOT / "README.md").read_text()


def test_the_echo_example_runs_as_printed(spawn: Callable[..., Process], address: str) -> None:
    """The two scripts of examples/echo answer each other, and double() copies nothing."""
    spawn(ROOT / "examples/echo/server.py", address)
    client = spawn(ROOT / "examples/echo/client.py", address, ready=False)
    assert client.readline() == "42.0 (1024, 2048) torch.bfloat16"
    assert client.readline() == "[0, 1, 2, 3, 4]"
    assert client.readline().split() == ["calls", "2"]
    assert client.wait() == 0


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_the_readme_shows_the_example_that_is_tested(script: str) -> None:
    """README's code is the example's, but for its docstring."""
    found = re.search(rf"<!-- examples/echo/{script} -->\n```python\n(.*?)```", README, re.DOTALL)
    code = (ROOT / "examples/echo" / script).read_text()
    assert found is not None
    assert found[1] == re.sub(r'\A""".*?"""\n\n', "", code, flags=re.DOTALL)


def test_the_layout_document_gives_the_header_as_it_is() -> None:
    """Each row of docs/memory-layout.md is a field of the header, at that offset and of that size."""
    text = (ROOT / "docs/memory-layout.md").read_text()
    rows = [(int(offset), int(size)) for offset, size in re.findall(r"^\| (\d+) \| (\d+) \|", text, re.MULTILINE)]
    ends = [offset + size for offset, size in rows]
    assert [offset for offset, _ in rows] == [0, *ends[:-1]]
    assert ends[-1] == HEADER.size
    assert f"`{MAGIC.decode()}`" in text
    assert f"format version, {FORMAT_VERSION}" in text
    assert f"header bytes, {HEADER.size}" in text
    layout = Layout(data_bytes=8192, release_slots=16)
    header = layout.header()
    assert int.from_bytes(header[40:48], "little") == layout.release_offset
    assert int.from_bytes(header[56:64], "little") == layout.data_offset
    assert int.from_bytes(header[64:72], "little") == layout.data_bytes


@pytest.mark.parametrize("document", ["README.md", "docs/security.md"])
@pytest.mark.parametrize("mode", list(Mode))
def test_documents_say_what_each_mode_shows_the_worker(document: str, mode: Mode) -> None:
    """The tables repeat the one description in operations.py."""
    rows = [line for line in (ROOT / document).read_text().splitlines() if line.startswith(f"| `{mode.value}`")]
    assert len(rows) == 1
    assert REVEALED[mode] in rows[0]
