"""Measures coverage and holds it to ``pyproject.toml``: ``python -m tests.support.coverage``."""

from __future__ import annotations

import subprocess
import sys

from tests.support.process import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def coverage(*arguments: str) -> None:
    """Run the tool; its failure ends this process with its exit code."""
    code = subprocess.run([sys.executable, "-m", "coverage", *arguments], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    policy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["shmtransport"]["coverage"]
    coverage("erase")
    coverage("run", "-m", "pytest", *policy["tests"])
    coverage("combine", "--quiet")
    coverage("report")
    coverage("report", "--fail-under=100", f"--include={','.join(policy['fully_covered'])}")


if __name__ == "__main__":
    main()
