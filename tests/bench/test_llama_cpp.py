"""What bench makes of llama.cpp's own figures, and what it says where there is no llama.cpp. No test builds it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import pytest

from bench.engine import llama_cpp, measure
from bench.engine.job import UNSPLIT
from bench.engine.measure import EnginePlan
from bench.harness.results import EngineRun
from bench.reports.engine_tables import engine_grids

# As the real programs: llama-quantize writes a file, llama-bench prints a test for each length, the server listens.
_QUANTIZE = """
import shutil, sys
assert sys.argv[1] == "--allow-requantize" and sys.argv[4] == "BF16"
shutil.copyfile(sys.argv[2], sys.argv[3])
"""
_BENCH = """
import json, socket, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--rpc" in options:
    host, _, port = options["--rpc"].partition(":")
    socket.create_connection((host, int(port))).close()
assert open(options["-m"], "rb").read(4) == b"GGUF" and options["-t"] == "2"
prompts, new = options["-p"].split(","), int(options["-n"])
tests = [{"n_prompt": int(one), "n_gen": new, "samples_ns": [5_000_000, 3_000_000, 4_000_000]} for one in prompts]
print(json.dumps(tests))
"""
_SERVER = """
import socket, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with socket.create_server((options["-H"], int(options["-p"]))) as listening:
    while True:
        listening.accept()[0].close()
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all of the path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(llama_cpp, "BUILT", tmp_path / "none")
    return tmp_path


def _install(directory: Path, name: str, program: str) -> None:
    path = directory / name
    path.write_text(f"#!{sys.executable}\n{program}")
    os.chmod(path, 0o755)  # noqa: S103


@pytest.mark.parametrize("mode", [llama_cpp.ALONE, llama_cpp.RPC])
def test_times_are_medians_in_milliseconds_and_a_generation_is_divided_by_its_tokens(programs: Path, mode: str) -> None:
    """What llama.cpp does not tell stays unknown."""
    for name, program in (("llama-quantize", _QUANTIZE), ("llama-bench", _BENCH), ("ggml-rpc-server", _SERVER)):
        _install(programs, name, program)
    row = llama_cpp.measure("smollm2", "bfloat16", mode, prompts=[128, 1024], new_tokens=8, repeats=3, threads=2)
    assert row.prefill_ms == {"128": 4.0, "1024": 4.0}
    assert row.decode_p50_ms == 0.5
    assert (row.mode, row.same_tokens, row.decode_p99_ms, row.client_cpu_s) == (mode, None, None, None)


def test_what_is_missing_is_named_with_its_remedy(programs: Path) -> None:
    with pytest.raises(llama_cpp.Unavailable, match="llama-quantize is not on the path; `make llama-cpp` builds it"):
        llama_cpp.measure("smollm2", "float32", llama_cpp.ALONE, prompts=[8], new_tokens=3, repeats=1, threads=1)


def test_what_a_program_says_when_it_fails_is_the_reason(programs: Path) -> None:
    _install(programs, "llama-quantize", "import sys; sys.exit('no such type')")
    with pytest.raises(llama_cpp.Unavailable, match="llama-quantize failed: no such type"):
        llama_cpp.measure("smollm2", "float32", llama_cpp.ALONE, prompts=[8], new_tokens=3, repeats=1, threads=1)


def test_a_shape_with_random_weights_has_no_file(programs: Path) -> None:
    with pytest.raises(llama_cpp.Unavailable, match="random weights"):
        llama_cpp.measure("llama-3.2-1b", "float32", llama_cpp.ALONE, prompts=[8], new_tokens=3, repeats=1, threads=1)


def test_a_run_has_what_peers_take_and_why_one_is_missing(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table shows a dash for what a peer does not tell."""
    for name, program in (("llama-quantize", _QUANTIZE), ("llama-bench", _BENCH)):
        _install(programs, name, program)
    monkeypatch.setattr(measure, "_jobs", lambda _plan: [])  # the models of this project are measured elsewhere
    plan = EnginePlan(["smollm2"], ["bfloat16"], [], [], [4], new_tokens=3, repeats=1, threads=2, spin_us=0, peers=True)
    run = measure.measure_engine(plan)
    (row,) = run.rows
    assert run.skipped == {
        "llama.cpp, RPC, smollm2, bfloat16": "ggml-rpc-server is not on the path; `make llama-cpp` builds it"
    }
    unsplit = msgspec.structs.replace(row, mode=UNSPLIT, decode_p50_ms=2 * row.decode_p50_ms)
    (grid,) = engine_grids(EngineRun(run.setting, [unsplit, row]))
    shown = dict(zip(grid.header, grid.rows[-1], strict=True))
    assert (shown["split"], shown["calls"], shown["same tokens"], shown["CPU s"]) == ("llama.cpp", "–", "–", "–")
    assert shown["/ unsplit"] == "0.50"
