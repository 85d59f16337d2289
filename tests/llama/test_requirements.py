"""Which versions of torch and transformers are taken: those that were tested, and what the others are told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_split import MissingPackage, requirements
from llama_split.requirements import TESTED, Range, check_requirements

ROOT = Path(__file__).parents[2]


def run_with(directory: Path, package: str, version: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where this version of a package seems to be installed."""
    metadata = directory / f"{package}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    environment = {**os.environ, "PYTHONPATH": f"{directory}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("package", TESTED)
def test_pyproject_states_the_tested_range(package: str) -> None:
    """Those that pip takes are those that are accepted."""
    assert f'"{package}{TESTED[package]}"' in (ROOT / "pyproject.toml").read_text()


def test_these_tests_run_in_the_tested_range() -> None:
    """A run of the tests with another version would say nothing about the range."""
    check_requirements()


@pytest.mark.parametrize(
    ("package", "version"), [("transformers", "5.25.0"), ("transformers", "5.19.9"), ("torch", "2.6.0+cpu")]
)
@pytest.mark.parametrize("command", ["info", "generate", "worker"])
def test_a_version_outside_of_the_range_ends_every_command_with_one_line(
    tmp_path: Path, package: str, version: str, command: str
) -> None:
    """Before anything computes: generation could print nonsense with it."""
    ended = run_with(tmp_path, package, version, "-m", "llama_split", command)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert f"error: {package} {version} is installed" in ended.stderr
    assert f"{package}{TESTED[package]}" in ended.stderr


def test_a_version_outside_of_the_range_is_refused_from_python(tmp_path: Path) -> None:
    """By the package's own error, where the model's class is first named."""
    program = (
        "import llama_split\ntry: llama_split.SplitLlamaForCausalLM\nexcept llama_split.LlamaSplitError as e: print(e)"
    )
    ended = run_with(tmp_path, "transformers", "5.25.0", "-c", program)
    assert ended.stdout.startswith("transformers 5.25.0 is installed")
    assert ended.returncode == 0


def test_a_missing_package_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra installs it."""
    monkeypatch.setattr(requirements, "TESTED", {"no-such-package": Range((1,), None)})
    with pytest.raises(MissingPackage, match=r"needs the package no-such-package: pip install 'shmtransport\[llama\]'"):
        check_requirements()


def test_a_generation_with_these_versions_is_the_unsplit_models() -> None:
    """The script that compares them, whichever versions are installed, passes here."""
    command = [sys.executable, "-m", "tests.llama.every_split"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("gives the unsplit model's tokens") == 4


@pytest.mark.parametrize(
    ("found", "inside"),
    [("5.20.0", True), ("5.20", True), ("5.24.9.post1", True), ("5.25.0.dev0", False), ("5.25", False), ("6", False)],
)
def test_a_range_is_compared_by_numbers(found: str, inside: bool) -> None:
    """A development version of the next one is that one already."""
    assert (requirements._release(found) in TESTED["transformers"]) is inside
