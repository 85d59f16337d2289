"""What a run has found, as structs that are written to and read from JSON. Times in the unit of a field's name."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import msgspec

from .contenders import CONTENDERS, Contender


class PairSize(msgspec.Struct, frozen=True):
    """One size in one pair of processes. CPU seconds are of the whole loop, with making and checking of tensors."""

    nbytes: int
    samples_ns: list[int]
    client_cpu_s: float
    server_cpu_s: float
    wall_s: float
    calls: int


class PairResult(msgspec.Struct, frozen=True):
    """What one pair of processes has found; idle: busy cores of client and server while nobody calls."""

    sizes: list[PairSize]
    idle_client_cores: float | None = None
    idle_server_cores: float | None = None


class About(msgspec.Struct, frozen=True):
    """What a contender says about itself."""

    group: str
    how: str
    copies: str
    reply: str

    @classmethod
    def of(cls, contender: type[Contender]) -> About:
        """Of a class."""
        return cls(contender.group, contender.how, contender.copies, contender.reply)


class Setting(msgspec.Struct, frozen=True):
    """Where and with what a run was made."""

    machine: dict[str, str]
    versions: dict[str, str]
    options: dict[str, str]


class LatencyRow(msgspec.Struct, frozen=True):
    """One contender at one size.

    ``round_p50_us`` are the rounds' own medians, whose spread is the noise; ``*_cores`` the CPU seconds of a side by
    the wall clock's.
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
    """Of ``python -m bench latency``."""

    setting: Setting
    contenders: dict[str, About]
    skipped: dict[str, str]
    rows: list[LatencyRow]
    idle_cores: dict[str, tuple[float, float]]


class ThroughputRow(msgspec.Struct, frozen=True):
    """One contender at one size with ``in_flight`` calls under way; bytes of both directions."""

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
    """Of ``python -m bench throughput``."""

    setting: Setting
    contenders: dict[str, About]
    skipped: dict[str, str]
    rows: list[ThroughputRow]


class SeedRow(msgspec.Struct, frozen=True):
    """One way of carrying one call pattern's forward; times in ms, the total of a forward's calls."""

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


class SeedRun(msgspec.Struct, frozen=True, tag="seed"):
    """Of ``python -m bench seed``."""

    setting: Setting
    rows: list[SeedRow]


class EngineRow(msgspec.Struct, frozen=True):
    """One way of running one model. By length of prompt, in tokens, where a field is a dict.

    ``prefill_calls`` are those of the shortest prompt; ``decode_*`` are of one token after the shortest one.
    ``same_tokens`` of ``tokens`` generated are the unsplit model's, before the first that is not.
    """

    model: str
    dtype: str
    mode: str
    channel: str
    prefill_ms: dict[str, float]
    prefill_calls: int
    prefill_mib: dict[str, float]
    decode_p50_ms: float
    decode_p99_ms: float
    decode_calls: float
    decode_kib: float
    same_tokens: int
    tokens: int
    client_cpu_s: float
    worker_cpu_s: float


class EngineRun(msgspec.Struct, frozen=True, tag="engine"):
    """Of ``python -m bench engine``."""

    setting: Setting
    rows: list[EngineRow]


Run = LatencyRun | ThroughputRun | SeedRun | EngineRun


def write(path: str | Path, run: Run) -> None:
    """Write a run, in a form that can be compared line by line."""
    Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")


def read(path: str | Path) -> Run:
    """Read a run."""
    run: Run = msgspec.json.decode(Path(path).read_bytes(), type=Run)
    return run


def latency_row(contender: str, nbytes: int, rounds: list[PairSize]) -> LatencyRow:
    """All rounds of a contender at a size as one row."""
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


def throughput_row(contender: str, nbytes: int, rounds: list[PairSize]) -> ThroughputRow:
    """All rounds of a contender at a size as one row."""
    each = [one.calls / one.wall_s for one in rounds]
    rate = statistics.median(each)
    calls = sum(one.calls for one in rounds)
    in_flight = CONTENDERS[contender].in_flight
    return ThroughputRow(contender, nbytes, in_flight, calls, rate, 2 * nbytes * rate, each, *busy_cores(rounds))


def busy_cores(rounds: list[PairSize]) -> tuple[float, float]:
    """CPU seconds of client and server by those of the wall clock."""
    wall = sum(one.wall_s for one in rounds)
    return sum(one.client_cpu_s for one in rounds) / wall, sum(one.server_cpu_s for one in rounds) / wall


def setting(contenders: Iterable[type[Contender]], **options: object) -> Setting:
    """This machine, the packages that are used, and the options of the run."""
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
