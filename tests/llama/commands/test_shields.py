"""Shields from the command line: masks that are dealt beforehand, and options that would have no effect."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.children import Child, Mother
from tests.support.commands import FORKED, Command, Running, is_one_line_error

pytestmark = pytest.mark.timeout(150)


@pytest.fixture(scope="module")
def integer_worker(llama_mother: Mother, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a worker that serves the tiny model in 8 bits."""
    address = f"ipc://{tmp_path_factory.mktemp('worker')}/worker.ipc"
    process = Child(llama_mother, FORKED, "worker", "--bind", address, "--model", str(tiny), "--dtype", "int8")
    process.wait_until_ready()
    yield address
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    process.end()


def generate(tiny: Path, *options: str) -> tuple[str, ...]:
    return ("generate", "--prompt", "w5 w6 w7", "--no-chat", "--model", str(tiny), "--max-new-tokens", "8", *options)


def test_masks_are_dealt_into_a_file_and_used_up(
    command: Command, tiny: Path, integer_worker: str, tmp_path: Path
) -> None:
    """The same tokens as with masks that the process deals; then an error in one line, with the remedy."""
    path = tmp_path / "masks"
    done = command("deal", "--masks", str(path), "--tokens", "16", "--logits", "16", "--model", str(tiny), "--json")
    assert (done.code, json.loads(done.out)["nbytes"]) == (0, path.stat().st_size)
    masked = generate(tiny, "--worker", integer_worker, "--shield", "otp", "--json")
    own = command(*masked)
    first, second = (command(*masked, "--masks", str(path)) for _ in range(2))
    assert (own.code, first.code) == (0, 0), own.err + first.err
    told = json.loads(first.out)
    assert told["token_ids"] == json.loads(own.out)["token_ids"]
    assert (told["dtype"], told["wire_dtype"]) == ("float32", "int32")
    assert is_one_line_error(second), second
    assert "deal more with `llama-split deal`" in second.err


def test_a_command_starts_a_worker_that_its_shield_can_use(tiny: Path, running: Callable[..., Running]) -> None:
    """In 8 bits under otp, without being told."""
    process = running(*generate(tiny, "--shield", "otp", "--json"))
    code, out, err = process.finish()
    assert code == 0, err
    assert len(json.loads(out)["token_ids"]) == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--masks", "some"), "--masks some would have no effect: pass --shield otp"),
        (("--shield", "otp", "--mode", "stack"), "otp can't be used in mode stack"),
        (("--shield", "otp", "--wire-dtype", "bfloat16"), "sends int32, so a wire dtype has no effect"),
        (("--shield", "otp", "--masks", "none-there"), "none-there can't be opened"),
        (("--shield", "lead"), "there is no shield 'lead'; there are: none, otp, verify"),
    ],
    ids=" ".join,
)
def test_what_has_no_effect_is_refused(
    command: Command, tiny: Path, integer_worker: str, options: tuple[str, ...], words: str
) -> None:
    """In one line, before anything is sent."""
    done = command(*generate(tiny, "--worker", integer_worker, *options))
    assert is_one_line_error(done), done
    assert words in done.err


def test_a_worker_that_only_multiplies_takes_no_options_of_attention(command: Command, tiny: Path) -> None:
    """All that were given are named."""
    done = command(
        "worker", "--bind", "ipc:///x", "--model", str(tiny), "--dtype", "int8", "--embedding", "--idle-s", "3"
    )
    assert is_one_line_error(done), done
    assert "--embedding and --idle-s would have no effect: with --dtype int8 a worker only multiplies" in done.err
    done = command("worker", "--bind", "ipc:///x", "--model", str(tiny), "--dtype", "int4")
    assert "choose one of float32, bfloat16, float16, int8" in done.err
