"""What the documents say is what the code does: examples, the memory layout, the table of modes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from llama_split.operations import REVEALED, Mode
from shmtransport.connection import segment_layout
from shmtransport.layout import FORMAT_VERSION, HEADER, MAGIC, Layout
from shmtransport.message_ring import MessageRing
from shmtransport.segment import Segment
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


def test_the_memory_layout_shows_the_message_rings_cells() -> None:
    """Each cell of the document's second table is where a ring's owner writes it, and the records begin behind them."""
    text = (ROOT / "docs/memory-layout.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| (published|consumed|1 while|1 once)", text, re.MULTILINE))
    layout = segment_layout(4096, 1024)
    one, other = Segment.create(layout), Segment.create(layout)
    try:
        ring, peer = MessageRing(one, other), MessageRing(other, one)
        assert ring.write(b"record")
        assert peer.write(b"answer")
        assert ring.read() == b"answer"
        ring.want_room(True)
        ring.end()
        area = one.view[layout.message_ring_offset : layout.message_ring_offset + layout.message_ring_bytes]
        cells = {offset: int.from_bytes(area[offset : offset + 8], "little") for offset in map(int, rows)}
        assert cells == {0: 16, 64: 16, 128: 1, 192: 1}
        assert [*rows.values()] == ["published", "consumed", "1 while", "1 once"]
        assert bytes(area[256:266]) == b"\x06\0\0\0record"
        assert "first 256 bytes" in text
        area.release()
        del ring, peer
    finally:
        one.close()
        other.close()


@pytest.mark.parametrize("document", ["README.md", "docs/security.md"])
@pytest.mark.parametrize("mode", list(Mode))
def test_documents_say_what_each_mode_shows_the_worker(document: str, mode: Mode) -> None:
    """The tables repeat the one description in operations.py."""
    rows = [line for line in (ROOT / document).read_text().splitlines() if line.startswith(f"| `{mode.value}`")]
    assert len(rows) == 1
    assert REVEALED[mode] in rows[0]
