"""Which versions of torch and transformers are accepted: the tested ones; others get a one-line error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_split import MissingPackage
from llama_split.boundary import requirements
from llama_split.boundary.requirements import TESTED, Range, check_requirements
from tests.support.children import Child, Mother
from tests.support.process import ROOT


def run_with(directory: Path, package: str, version: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with this version of a package apparently installed."""
    metadata = directory / f"{package}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    environment = {**os.environ, "PYTHONPATH": f"{directory}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("package", TESTED)
def test_pyproject_states_the_tested_range(package: str) -> None:
    """The range that pip installs is the range that the package accepts."""
    assert f'"{package}{TESTED[package]}"' in (ROOT / "pyproject.toml").read_text()


def test_these_tests_run_in_the_tested_range() -> None:
    """A run of the tests with another version would say nothing about the range."""
    check_requirements()


@pytest.mark.parametrize(
    ("package", "version", "command"),
    [
        *(("transformers", "5.25.0", command) for command in ("info", "generate", "worker")),
        ("transformers", "5.19.9", "generate"),
        ("torch", "2.6.0+cpu", "worker"),
    ],
)
def test_a_version_outside_of_the_range_ends_every_command_with_one_line(
    tmp_path: Path, package: str, version: str, command: str
) -> None:
    """The error comes before any computation: generation might print nonsense."""
    ended = run_with(tmp_path, package, version, "-m", "llama_split", command)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert f"error: {package} {version} is installed" in ended.stderr
    assert f"{package}{TESTED[package]}" in ended.stderr


def test_a_version_outside_of_the_range_is_refused_from_python(tmp_path: Path) -> None:
    """The package's own error comes as soon as the model's class is named."""
    program = (
        "import llama_split\ntry: llama_split.SplitLlamaForCausalLM\nexcept llama_split.LlamaSplitError as e: print(e)"
    )
    ended = run_with(tmp_path, "transformers", "5.25.0", "-c", program)
    assert ended.stdout.startswith("transformers 5.25.0 is installed")
    assert ended.returncode == 0


def test_a_missing_package_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is the extra that installs it."""
    monkeypatch.setattr(requirements, "TESTED", {"no-such-package": Range((1,), None)})
    with pytest.raises(MissingPackage, match=r"needs the package no-such-package: pip install 'shmtransport\[llama\]'"):
        check_requirements()


@pytest.mark.parametrize(
    ("statement", "missing"),
    [
        ("from llama_split.checkpoint import open_checkpoint", "transformers"),
        ("from llama_split.checkpoint import GgufCheckpoint", "gguf"),
        ("from llama_split import SplitLlamaForCausalLM", "transformers"),
        ("import runpy; runpy.run_module('llama_split', run_name='__main__')", "typer"),
    ],
)
def test_a_bare_installation_names_the_extra(statement: str, missing: str) -> None:
    """From Python and from the command line, whatever is asked for first."""
    program = f"import sys; sys.modules['{missing}'] = None; {statement}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert ended.returncode != 0
    assert ended.stderr.splitlines()[-1].endswith(
        f"llama_split needs the package {missing}: pip install 'shmtransport[llama]'"
    )


def test_a_generation_with_these_versions_is_the_unsplit_models(llama_mother: Mother) -> None:
    """The comparison script passes with the installed versions."""
    script = Child(llama_mother, ROOT / "tests/llama/every_split.py")
    said = script.output.read()
    code = script.wait()
    script.end()
    assert code == 0, said
    assert said.count("gives the unsplit model's tokens") == 4


@pytest.mark.parametrize(
    ("found", "inside"),
    [("5.20.0", True), ("5.20", True), ("5.24.9.post1", True), ("5.25.0.dev0", False), ("5.25", False), ("6", False)],
)
def test_a_range_is_compared_by_numbers(found: str, inside: bool) -> None:
    """A development version of the next release counts as that release."""
    assert (requirements._release(found) in TESTED["transformers"]) is inside
