"""The code of documents, and what their comments say that it prints.

A comment after a ``print``, or at the beginning of a line, is what is printed; "…" in it stands for anything.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.support.process import ROOT

DOCS = ROOT / "docs"


def python_of(text: str) -> str:
    """All Python of a page, as one script."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))


def run_page(page: str, code: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run a page's code in this process; the lines that it printed."""
    script = directory / f"{Path(page).stem}.py"
    script.write_text(code)
    runpy.run_path(str(script))
    return capsys.readouterr().out.splitlines()


def assert_printed(printed: list[str], code: str) -> None:
    """Check that every line that was printed is the promised one, in order."""
    promised = [end or line for end, line in re.findall(r"^ *print\(.*\)  # (.*)$|^# (.*)$", code, re.MULTILINE)]
    assert promised
    assert len(printed) == len(promised), printed
    for line, pattern in zip(printed, promised, strict=True):
        assert re.fullmatch(".*".join(map(re.escape, pattern.split("…"))), line), (line, pattern)
