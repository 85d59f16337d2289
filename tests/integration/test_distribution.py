"""What is packed into the source distribution."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.process import ROOT

_ENTRIES = (
    *("bench", "docs", "examples", "llama_split", "shmtransport", "tests"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "SECURITY.md"),
    *("constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.py"),
)


def test_the_source_distribution_is_complete(tmp_path: Path) -> None:
    """With it a user can read the documents, run the examples, and run the tests with make."""
    pytest.importorskip("setuptools", "77")
    tree = tmp_path / "tree"
    tree.mkdir()
    for entry in _ENTRIES:
        if (ROOT / entry).is_dir():
            shutil.copytree(ROOT / entry, tree / entry, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / entry, tree)
    wanted = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tree, capture_output=True, check=True, timeout=120)
    (packed,) = (tree / "dist").glob("shmtransport-*.tar.gz")
    with tarfile.open(packed) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted - found == set()
