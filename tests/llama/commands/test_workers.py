"""Options of the worker and of its client take effect; a command that loses its own worker starts another."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from llama_split import SplitLlamaForCausalLM
from shmtransport import Client, ConnectRefused, RemoteError
from tests.support.children import Mother
from tests.support.commands import Command, Running, is_one_line_error, workers_of

pytestmark = pytest.mark.timeout(150)

SESSION_BYTES = 2 * 2 * 16 * 4 * 128
"""What a session of the tiny model takes: keys and values, two layers, 16 wide, float32, 128 positions."""


@dataclass(frozen=True)
class Limited:
    """A worker with limits, and what it said when it was ready."""

    address: str
    ready: dict[str, Any]


@pytest.fixture(scope="module")
def limited(llama_mother: Mother, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    """One session, of one row; one thread; with the embedding. In the end it prints its statistics."""
    address = f"ipc://{tmp_path_factory.mktemp('limited')}/worker.ipc"
    limits = ("--max-sessions", "1", "--max-kv-bytes", str(SESSION_BYTES), "--idle-s", "500")
    others = ("--threads", "1", "--embedding", "--json", "--channels", "zmq")
    process = Running(llama_mother, "worker", "--bind", address, "--model", str(tiny), *limits, *others)
    ready = json.loads(process.readline())
    with Client(address) as client:
        client.ping()  # whichever of these tests this process runs, there is a call to count
    yield Limited(address, ready)
    process.signal(signal.SIGTERM)
    code, out, err = process.finish()
    process.end()
    assert code == 0, err
    assert json.loads(out)["statistics"]["calls"] > 0


def test_a_worker_offers_the_channels_that_it_was_told_to(limited: Limited, tiny: Path) -> None:
    """A client that asks for another channel is refused, by the channel's name."""
    with pytest.raises(ConnectRefused, match="channel doorbell was asked for; its channels are zmq: use zmq"):
        SplitLlamaForCausalLM.from_pretrained(tiny, worker=limited.address, channel="doorbell")


@pytest.mark.parametrize("channels", ["pigeon", "", "zmq,pigeon", "zmq,"])
def test_channels_that_there_are_not_are_refused(command: Command, tiny: Path, channels: str) -> None:
    """The one line lists the channels that exist."""
    finished = command("worker", "--bind", "ipc:///tmp/never.ipc", "--model", str(tiny), "--channels", channels)
    assert is_one_line_error(finished)
    assert "choose one of zmq, doorbell" in finished.err


def test_a_worker_says_in_json_what_it_is(limited: Limited, tiny: Path) -> None:
    """One object on standard output once it answers."""
    assert limited.ready.pop("process") > 0
    assert limited.ready == {
        "ready": True,
        "model": str(tiny),
        "dtype": "float32",
        "device": "cpu",
        "address": limited.address,
        "layers": "0-1",
        "threads": 1,
    }


def test_two_workers_share_the_layers(
    command: Command, llama_mother: Mother, worker: str, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each is told its layers; a command that names both gets the tokens of one worker, in one call to each."""
    directory = tmp_path_factory.mktemp("shared")
    addresses = [f"ipc://{directory}/{layers}.ipc" for layers in ("0-0", "1-1")]
    workers = [
        Running(llama_mother, "worker", "--bind", address, "--model", str(tiny), "--threads", "1", "--layers", layers)
        for address, layers in zip(addresses, ("0-0", "1-1"), strict=True)
    ]
    try:
        assert all("layers" in process.readline() for process in workers)
        common = ("generate", "--prompt", "w5 w6", "--no-chat", "--json", "--max-new-tokens", "8", "--model", str(tiny))
        named = [option for address in addresses for option in ("--worker", address)]
        whole = json.loads(command(*common, "--worker", worker).out)
        shared = json.loads(command(*common, *named, "--mode", "stack", "--pipeline", "2").out)
        assert shared["token_ids"] == whole["token_ids"]
        assert shared["transport"]["address"] == ", ".join(addresses)
        assert shared["statistics"]["calls"] >= 2 * len(whole["token_ids"])
        done = command(*common, "--worker", addresses[0])
        assert is_one_line_error(done)
        assert "the workers hold layers 0-0, and the model has 0-1" in done.err
    finally:
        for process in workers:
            process.signal(signal.SIGTERM)
            assert process.finish()[0] == 0
            process.end()


@pytest.mark.parametrize(("layers", "said"), [("1", "for example 0-1"), ("1-2", "this model, which has 0-1")])
def test_layers_that_there_are_not_are_refused(command: Command, tiny: Path, layers: str, said: str) -> None:
    """Before anything is loaded."""
    finished = command("worker", "--bind", "ipc:///tmp/never.ipc", "--model", str(tiny), "--layers", layers)
    assert is_one_line_error(finished)
    assert said in finished.err


def test_limits_of_sessions_are_in_force(limited: Limited, tiny: Path) -> None:
    """A second session, or one with too many rows, is refused with the option that would allow it."""
    ids = torch.tensor([[5, 6, 7]])
    options = {"worker": limited.address, "mode": "stack", "dtype": "float32", "channel": "zmq"}
    with SplitLlamaForCausalLM.from_pretrained(tiny, **options) as llama:
        kept = llama(ids, use_cache=True).past_key_values
        with pytest.raises(RemoteError, match=r"has 1 KV sessions.* none was idle for 500 s.*--max-sessions"):
            llama(ids)
        del kept
    with (
        SplitLlamaForCausalLM.from_pretrained(tiny, **options) as llama,
        pytest.raises(RemoteError, match=r"raise --max-kv-bytes"),
    ):
        llama(ids.expand(2, 3))


def test_options_of_the_trusted_side_are_in_force(command: Command, limited: Limited, worker: str, tiny: Path) -> None:
    """Mode op at a worker with the embedding, another wire dtype, threads: seen in JSON, and half the bytes."""
    common = ("generate", "--prompt", "w5 w6", "--no-chat", "--json", "--max-new-tokens", "8", "--model", str(tiny))
    plain, thin = (
        json.loads(command(*common, "--worker", limited.address, "--mode", "op", *options).out)
        for options in ((), ("--wire-dtype", "bfloat16", "--threads", "1", "--no-reconnect"))
    )
    assert plain["token_ids"] == json.loads(command(*common, "--worker", worker).out)["token_ids"]
    assert (thin["mode"], thin["dtype"], thin["wire_dtype"], thin["threads"]) == ("op", "float32", "bfloat16", 1)
    ids = 8 * (2 + 7)  # of 8 bytes, whatever the wire's dtype
    sent = plain["statistics"]["tensor_bytes_sent"] - ids
    assert thin["statistics"]["tensor_bytes_sent"] - ids == sent / 2
    done = command(*common, "--worker", worker, "--mode", "op")
    assert is_one_line_error(done), done
    assert "start it with --embedding" in done.err


def test_sampling_follows_its_seed(command: Command, worker: str, tiny: Path) -> None:
    """The same seed gives the same tokens; no seed, different ones; a choice of only the likeliest is greedy."""
    common = ("generate", "--prompt", "w5 w6", "--no-chat", "--json", "--max-new-tokens", "20", "--model", str(tiny))

    def tokens(*options: str) -> list[int]:
        return json.loads(command(*common, "--worker", worker, *options).out)["token_ids"]  # type: ignore[no-any-return]

    hot = ("--temperature", "1.5", "--top-p", "0.9")
    seeded = tokens(*hot, "--seed-sampling", "7")
    assert tokens(*hot, "--seed-sampling", "7") == seeded
    assert len({tuple(seeded), tuple(tokens(*hot)), tuple(tokens(*hot)), tuple(tokens())}) == 4
    assert tokens("--temperature", "1.5", "--top-k", "1") == tokens() == tokens("--temperature", "0")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("worker", "--max-sessions", "0"), "'--max-sessions'"),
        (("worker", "--max-kv-bytes", "2GB"), "'--max-kv-bytes'"),
        (("worker", "--idle-s", "-1"), "'--idle-s'"),
        (("worker", "--threads", "0"), "'--threads'"),
        (("generate",), "Missing option '--prompt'"),
        (("generate", "--prompt", "x", "--temperature", "-1"), "'--temperature'"),
        (("generate", "--prompt", "x", "--temperature", "inf"), "--temperature inf is not finite"),
        (("generate", "--prompt", "x", "--top-p", "0.5"), "--top-p would have no effect"),
        (("generate", "--prompt", "x", "--top-k", "3", "--temperature", "0"), "--top-k would have no effect"),
        (("generate", "--prompt", "x", "--wire-dtype", "int4"), "int4 is not supported"),
        (("generate", "--prompt", "\udcff", "--no-chat"), "the text is not valid UTF-8"),
        (("chat", "--seed-sampling", "1"), "--seed-sampling would have no effect"),
        (("chat", "--nonsense"), "No such option"),
        (("talk",), "No such command 'talk'"),
    ],
)
def test_a_bad_value_is_one_line(
    command: Command, worker: str, tiny: Path, arguments: tuple[str, ...], reason: str
) -> None:
    """The line names the option; the exit code is 2."""
    done = command(*arguments, LLAMA_MODEL_PATH=str(tiny), LLAMA_IPC_PATH=worker)
    assert is_one_line_error(done), done
    assert reason in done.err


def wait_for(stream: IO[str], text: str) -> str:
    """Read a stream up to the line that contains this text."""
    lines = ""
    for line in stream:
        lines += line
        if text in line:
            return lines
    raise AssertionError(f"{text!r} was never said, only {lines!r}")


def test_a_worker_of_our_own_that_is_lost_is_started_again(
    running: Callable[..., Running], command: Command, worker: str, long: Path
) -> None:
    """Killed, then terminated, in the middle of a text: the log reports it, and the text stays the same."""
    common = ("generate", "--prompt", "w5", "--no-chat", "--model", str(long), "--max-new-tokens", "300")
    process = running(*common, "--mode", "op", "--threads", "1")
    said = process.output.read(1)
    for number in (signal.SIGKILL, signal.SIGTERM):
        (its_own,) = workers_of(process.pid)
        os.kill(its_own, number)
        logged = wait_for(process.errors, "again (process")
        assert "was lost" in logged
        assert "connecting again, try 1 of" in logged
    code, rest, err = process.finish()
    assert code == 0, err
    text = (said + rest).split("\n")[0].strip()
    expected = json.loads(command(*common, "--worker", worker, "--json").out)
    assert len(expected["token_ids"]) == 300
    assert text == expected["text"]
    assert workers_of(process.pid) == []
