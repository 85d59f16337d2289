"""How the tables of runs get into documents."""

from __future__ import annotations

import re

import pytest

from bench.commands.options import DOCUMENTS, IMAGES, ROOT
from bench.harness.results import EngineRun, ThroughputRun
from bench.reports.documents import fill_documents
from bench.reports.grid import size_text

from .runs import NOWHERE, baseline_run, latency_run


def test_a_run_fills_its_sections_in_whichever_document_has_them() -> None:
    """Sections without figures stay; doing it twice gives the same."""
    names = (("method", "overview"), ("targets", "latency", "throughput", "baseline"))
    documents = ["\n".join(f"<!-- bench:{name} -->old {name}<!-- /bench:{name} -->" for name in each) for each in names]
    runs = [latency_run(("grpcio", 64, [12.3])), baseline_run()]
    written = fill_documents(documents, runs)
    assert "| grpcio | 12.3 µs |" in written[0]
    assert "not installed: grpcio" in written[1]
    assert "old throughput" in written[1]
    assert "old baseline" not in written[1]
    assert fill_documents(written, runs) == written


def test_a_section_must_be_there_exactly_once() -> None:
    section = "<!-- bench:method --><!-- /bench:method -->"
    with pytest.raises(ValueError, match="0 sections"):
        fill_documents([""], [])
    with pytest.raises(ValueError, match="2 sections"):
        fill_documents([section, section], [])
    assert "grpcio" in fill_documents(["", section], [])[1]


def test_the_projects_own_documents_have_all_sections() -> None:
    """``make bench`` and ``make bench-engine`` write into them."""
    documents = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    runs = [
        latency_run(("grpcio", 64, [1.0])),
        ThroughputRun(NOWHERE, {}, {}, []),
        baseline_run(),
        EngineRun(NOWHERE, []),
    ]
    assert all(new != old for new, old in zip(fill_documents(documents, runs), documents, strict=True))


def test_what_the_documents_say_about_contenders_is_up_to_date() -> None:
    """The table of the method needs no run: ``python -m bench report`` writes it."""
    documents = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    assert fill_documents(documents, []) == documents


def test_the_documents_show_the_plots() -> None:
    """Every plot is shown once, and exists."""
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert sorted(shown) == sorted(f"images/{path.name}" for path in IMAGES.iterdir())
    assert IMAGES.parent == ROOT / "docs"


def test_sizes_read_well() -> None:
    assert [size_text(size) for size in (64, 1024, 65536, 1 << 20, 100 << 20, 1000)] == [
        "64 B",
        "1 KiB",
        "64 KiB",
        "1 MiB",
        "100 MiB",
        "1000 B",
    ]
