"""Results of runs, as structs that are written to JSON and read from it; a field's name ends in its unit."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import msgspec

from .contender import Contender


class PairSize(msgspec.Struct, frozen=True):
    """One size in one pair of processes; CPU time is that of the whole loop, stamping and checking included."""

    nbytes: int
    samples_ns: list[int]
    client_cpu_s: float
    server_cpu_s: float
    wall_s: float
    calls: int


class PairResult(msgspec.Struct, frozen=True):
    """What one pair of processes measured; ``idle_*_cores`` are the busy cores of a side without calls."""

    sizes: list[PairSize]
    idle_client_cores: float | None = None
    idle_server_cores: float | None = None


class About(msgspec.Struct, frozen=True):
    """What a contender states about itself."""

    group: str
    how: str
    copies: str
    reply: str

    @classmethod
    def of(cls, contender: type[Contender]) -> About:
        """The statements of a class."""
        return cls(contender.group, contender.how, contender.copies, contender.reply)


class Setting(msgspec.Struct, frozen=True):
    """The machine, the packages and the options of a run."""

    machine: dict[str, str]
    versions: dict[str, str]
    options: dict[str, str]


class LatencyRow(msgspec.Struct, frozen=True):
    """One contender at one size.

    ``round_p50_us`` are the medians of the single rounds, whose spread is the noise; ``*_cores`` are a side's CPU
    seconds per second of wall time.
    """

    contender: str
    nbytes: int
    calls: int
    min_us: float
    p50_us: float
    p99_us: float
    round_p50_us: list[float]
    client_cores: float
    server_cores: float


class LatencyRun(msgspec.Struct, frozen=True, tag="latency"):
    """The result of ``python -m bench latency``."""

    setting: Setting
    contenders: dict[str, About]
    skipped: dict[str, str]
    rows: list[LatencyRow]
    idle_cores: dict[str, tuple[float, float]]


class ThroughputRow(msgspec.Struct, frozen=True):
    """One contender at one size with ``in_flight`` calls in flight; bytes of both directions."""

    contender: str
    nbytes: int
    in_flight: int
    calls: int
    calls_per_s: float
    bytes_per_s: float
    round_calls_per_s: list[float]
    client_cores: float
    server_cores: float


class ThroughputRun(msgspec.Struct, frozen=True, tag="throughput"):
    """The result of ``python -m bench throughput``."""

    setting: Setting
    contenders: dict[str, About]
    skipped: dict[str, str]
    rows: list[ThroughputRow]


class BaselineRow(msgspec.Struct, frozen=True):
    """One way of carrying the calls of one pattern's forward; ``*_total_ms`` are of all calls of a forward."""

    contender: str
    dtype: str
    pattern: str
    calls: int
    forwards: int
    total_ms: float
    min_total_ms: float
    round_total_ms: list[float]
    rpc_ms_per_call: float
    serialise_ms_per_call: float
    deserialise_ms_per_call: float
    zmq_mib: float
    shm_mib: float


class BaselineRun(msgspec.Struct, frozen=True, tag="baseline"):
    """The result of ``python -m bench baseline``."""

    setting: Setting
    rows: list[BaselineRow]


class EngineRow(msgspec.Struct, frozen=True):
    """One way of running one model; dicts are by the prompt's length in tokens.

    ``prefill_calls`` are those of the first prompt, ``decode_*`` those of one token generated after it. Of the
    ``tokens`` generated, the first ``same_tokens`` are the unsplit model's. What is None is not known of a peer.
    """

    model: str
    dtype: str
    mode: str
    channel: str
    prefill_ms: dict[str, float]
    prefill_calls: int | None
    prefill_mib: dict[str, float]
    decode_p50_ms: float
    decode_p99_ms: float | None
    decode_calls: float | None
    decode_kib: float | None
    same_tokens: int | None
    tokens: int
    client_cpu_s: float | None
    worker_cpu_s: float | None


class EngineRun(msgspec.Struct, frozen=True, tag="engine"):
    """The result of ``python -m bench engine``."""

    setting: Setting
    rows: list[EngineRow]
    skipped: dict[str, str] = {}


Run = LatencyRun | ThroughputRun | BaselineRun | EngineRun


def write(path: str | Path, run: Run) -> None:
    """Write a run, indented so that files can be compared line by line."""
    Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")


def read(path: str | Path) -> Run:
    """Read a run."""
    run: Run = msgspec.json.decode(Path(path).read_bytes(), type=Run)
    return run


def latency_row(contender: str, nbytes: int, rounds: list[PairSize]) -> LatencyRow:
    """Combine all rounds of a contender at a size."""
    samples = sorted(sample for one in rounds for sample in one.samples_ns)
    client, server = busy_cores(rounds)
    return LatencyRow(
        contender,
        nbytes,
        len(samples),
        samples[0] / 1e3,
        statistics.median(samples) / 1e3,
        samples[min(len(samples) * 99 // 100, len(samples) - 1)] / 1e3,
        [statistics.median(one.samples_ns) / 1e3 for one in rounds],
        client,
        server,
    )


def throughput_row(contender: type[Contender], nbytes: int, rounds: list[PairSize]) -> ThroughputRow:
    """Combine all rounds of a contender at a size."""
    each = [one.calls / one.wall_s for one in rounds]
    rate = statistics.median(each)
    calls = sum(one.calls for one in rounds)
    cores = busy_cores(rounds)
    return ThroughputRow(contender.name, nbytes, contender.in_flight, calls, rate, 2 * nbytes * rate, each, *cores)


def busy_cores(rounds: list[PairSize]) -> tuple[float, float]:
    """CPU seconds of client and server per second of wall time."""
    wall = sum(one.wall_s for one in rounds)
    return sum(one.client_cpu_s for one in rounds) / wall, sum(one.server_cpu_s for one in rounds) / wall


def setting(contenders: Iterable[type[Contender]], **options: object) -> Setting:
    """Describe this machine, the packages that are used, and the options of the run."""
    versions = {"Python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "numpy", "pyzmq", "msgspec")}
    for contender in contenders:
        versions |= contender.versions()
    return Setting(_machine(), versions, {name: str(value) for name, value in options.items()})


def _machine() -> dict[str, str]:
    model = ""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": model or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        "Linux": platform.release(),
        "load at the start": f"{os.getloadavg()[0]:.2f}",
    }
