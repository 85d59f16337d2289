"""Times llama.cpp with the same model: alone, and with its RPC server as the worker.

Its programs are looked for on the path and in ``build/llama.cpp/bin``, where ``make llama-cpp`` puts them. Its own
``llama-bench`` times prompts and generated tokens; it shows no tokens, so that they are not compared.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from llama_split.checkpoint.demo import demo_model
from llama_split.errors import CheckpointError

from ..harness.results import EngineRow
from .job import DEMO

ALONE = "llama.cpp"
RPC = "llama.cpp, RPC"
BUILT = Path("build/llama.cpp/bin")
_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_TIMEOUT_S = 900.0
_STARTED_S = 30.0


class Unavailable(Exception):
    """This peer can't be measured here; the text says why."""


class _Timed(msgspec.Struct, frozen=True):
    """What ``llama-bench`` prints of one test: nanoseconds of each repetition."""

    n_prompt: int
    n_gen: int
    samples_ns: list[int]


def measure(
    model: str, dtype: str, mode: str, *, prompts: Sequence[int], new_tokens: int, repeats: int, threads: int
) -> EngineRow:
    """Time prompts, and the tokens after the first of them: the median generation, divided by its tokens.

    Args:
        model: as in ``bench engine``.
        dtype: of the weights.
        mode: ``ALONE`` or ``RPC``.
        prompts: lengths in tokens.
        new_tokens: tokens to generate.
        repeats: how often each is timed.
        threads: threads of each process that computes.

    Raises:
        Unavailable: its programs or the model are missing, or it fails.
    """
    if model != DEMO:
        raise Unavailable("it reads models from files, and those of shapes have random weights")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-llama-cpp-"))
        path = Path(directory, "model.gguf")
        _output([_program("llama-quantize"), "--allow-requantize", _demo_model(), str(path), _TYPES[dtype]])
        command = [_program("llama-bench"), "-m", str(path), "-t", str(threads), "-r", str(repeats), "-o", "json"]
        if mode == RPC:
            command += ["--rpc", stack.enter_context(_rpc_server(threads)), "-ngl", "99"]
        lengths = ",".join(map(str, prompts))
        prefills = _timed([*command, "-p", lengths, "-n", "0"])
        (decoded,) = _timed([*command, "-p", "0", "-n", str(new_tokens), "-d", str(prompts[0])])
    return EngineRow(
        model=model,
        dtype=dtype,
        mode=mode,
        channel="",
        prefill_ms={str(one.n_prompt): statistics.median(one.samples_ns) / 1e6 for one in prefills},
        prefill_calls=None,
        prefill_mib={},
        decode_p50_ms=statistics.median(decoded.samples_ns) / decoded.n_gen / 1e6,
        decode_p99_ms=None,
        decode_calls=None,
        decode_kib=None,
        same_tokens=None,
        tokens=new_tokens,
        client_cpu_s=None,
        worker_cpu_s=None,
    )


def _demo_model() -> str:
    try:
        return str(demo_model())
    except CheckpointError as error:
        raise Unavailable(str(error)) from None


@contextlib.contextmanager
def _rpc_server(threads: int) -> Iterator[str]:
    """A running RPC server; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [_program("ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", str(threads)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(port, server)
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _STARTED_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.05)
    raise Unavailable("its RPC server does not listen")


def _program(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([str(BUILT), os.environ.get("PATH", "")]))
    if found is None:
        raise Unavailable(f"{name} is not on the path; `make llama-cpp` builds it")
    return found


def _timed(command: Sequence[str]) -> list[_Timed]:
    return msgspec.json.decode(_output(command), type=list[_Timed])


def _output(command: Sequence[str]) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=True).stdout
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{Path(command[0]).name} took more than {_TIMEOUT_S:g} s") from None
    except subprocess.CalledProcessError as error:
        told = error.stderr.decode(errors="replace").strip().splitlines()
        raise Unavailable(f"{Path(command[0]).name} failed: {told[-1] if told else error.returncode}") from None
