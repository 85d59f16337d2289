"""What the command line accepts, and what the presets choose."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench.baseline.contenders import BASELINE_CONTENDERS
from bench.commands import app, presets
from bench.commands.baseline import BaselineOptions
from bench.commands.engine import EngineOptions
from bench.commands.options import contenders_of, sizes_of
from bench.commands.round_trips import LatencyOptions, ThroughputOptions

from .runs import latency_run


@pytest.mark.parametrize(("p50", "code"), [(50.0, 0), (53.0, 0), (80.0, 1)])
def test_check_fails_on_a_loss_only(p50: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line, against what --update has stored."""
    stored = ["--stored", str(tmp_path / "ratios.json")]

    def checked(ours: float, *options: str) -> int:
        found = latency_run(("zmq, in place", 64, [ours, ours]), ("pyzmq DEALER/ROUTER, no tensor", 64, [40.0, 40.0]))
        monkeypatch.setattr("bench.harness.runner.latency", lambda *_arguments, **_options: found)
        return CliRunner().invoke(app, ["check", *stored, *options]).exit_code

    assert checked(50.0) == 2  # nothing is stored yet
    assert checked(50.0, "--update") == 0
    assert checked(p50) == code


@pytest.mark.parametrize(
    "name",
    ["latency", "throughput", "baseline", "engine", "gpu", "sharing", "shield", "masked", "check", "report", "seed"],
)
def test_every_command_explains_itself(name: str) -> None:
    """Also the former name of ``baseline``, which the list of commands doesn't show."""
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_the_list_of_commands_shows_the_presets() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(f" {name} " in shown for name in ("baseline", "all", "quick", "engine-all"))
    assert " seed " not in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["latency", "--sizes", "60"],
        ["latency", "--sizes", "big"],
        ["latency", "--contenders", "no such thing"],
        ["baseline", "--contenders", "no such thing"],
        ["baseline", "--dtypes", "int8"],
        ["engine", "--modes", "none"],
        ["engine", "--prompts", "long"],
        ["sharing", "--modes", "fused"],
        ["sharing", "--pipelines", "many"],
    ],
    ids=" ".join,
)
def test_a_wrong_value_is_refused_before_anything_runs(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_presets_choose_what_exists() -> None:
    """Each value is one that the command itself would accept."""
    options = [one for one in vars(presets).values() if not isinstance(one, type)]
    for one in options:
        if isinstance(one, LatencyOptions | ThroughputOptions):
            assert contenders_of(one.contenders)
            assert sizes_of(one.sizes)
        elif isinstance(one, BaselineOptions):
            assert one.names()
        elif isinstance(one, EngineOptions):
            assert one.plan().modes
    assert sum(isinstance(one, LatencyOptions) for one in options) == 2


def test_baseline_contenders_are_chosen_by_parts_of_their_names() -> None:
    assert BaselineOptions().names() == list(BASELINE_CONTENDERS)
    assert BaselineOptions(contenders="zmq, copy in").names() == ["zmq, copy in"]
    assert BaselineOptions(contenders="memcpy,original").names() == ["memcpy of the same bytes", "original"]
    with pytest.raises(typer.BadParameter, match="no contender"):
        BaselineOptions(contenders="doorbell,no such thing").names()
