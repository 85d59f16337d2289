"""Fixtures of the integration tests: processes that serve all of them, and bare sockets."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zmq

from shmtransport.message import ChannelKind
from tests.conftest import ROOT, Process

from .children import Child, Mother
from .commands import LLAMA, Command, Finished, environment
from .strangers import Stranger

VOCABULARY = 2000  # a row of logits is 8000 bytes, more than the smallest arena


@pytest.fixture(params=["zmq", "doorbell"])
def channel(request: pytest.FixtureRequest) -> ChannelKind:
    """Both kinds of channel, in turn."""
    kind: ChannelKind = request.param
    return kind


@pytest.fixture(scope="session")
def mother() -> Iterator[Mother]:
    """What the tests' processes are forked from."""
    mother = Mother()
    yield mother
    mother.end()


@pytest.fixture
def spawn(mother: Mother) -> Iterator[Callable[..., Process]]:
    """Start scripts as processes of their own, quickly; what still runs at the test's end is killed."""
    started: list[Process] = []

    def start(script: str | Path, *arguments: str, ready: bool = True) -> Process:
        started.append(Child(mother, script, *arguments))
        if ready:
            started[-1].wait_until_ready()
        return started[-1]

    yield start
    for process in started:
        process.end()


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory, mother: Mother) -> Iterator[str]:
    """The address of a server in a process of its own, shared by these tests."""
    address = f"ipc://{tmp_path_factory.mktemp('server')}/server.ipc"
    process = Child(mother, ROOT / "tests/scripts/server.py", address)
    process.wait_until_ready()
    yield address
    process.end()


@pytest.fixture
def stranger(address: str) -> Iterator[Callable[[], Stranger]]:
    """Make bare sockets that are connected to the test's server."""
    made: list[Stranger] = []

    def make() -> Stranger:
        made.append(Stranger(address))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def nothing_unhandled(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No event loop and no executor had an exception that nobody took."""
    yield
    gc.collect()
    assert not [record for record in caplog.get_records("call") if record.name in ("asyncio", "concurrent.futures")]


@pytest.fixture
def fake_server(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A bare ROUTER socket where a server should be."""
    context = zmq.Context()
    router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    router.linger = 1000
    router.bind(address)
    yield router
    router.close()
    context.term()


@pytest.fixture(scope="session")
def command(tiny: Path) -> Iterator[Command]:
    """Run the command in a process forked from a warm one: ``command(*arguments, said="", **variables)``.

    Importing torch and transformers takes many seconds; ``scripts/warm.py`` has done it once for all.
    """
    warm = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/scripts/warm.py"), str(tiny)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert warm.stdin is not None
    assert warm.stdout is not None
    assert warm.stdout.readline() == "ready\n"

    def command(*arguments: str, said: str = "", **variables: str) -> Finished:
        assert warm.stdin is not None
        assert warm.stdout is not None
        warm.stdin.write(json.dumps({"arguments": arguments, "environment": variables, "said": said}) + "\n")
        warm.stdin.flush()
        return Finished(**json.loads(warm.stdout.readline()))

    yield command
    warm.stdin.close()
    warm.wait(10)
    warm.stdout.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama of 32 positions with a tokenizer of whole words: "w0" … "w1999"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)  # noqa: S106
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def long(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with so many positions that a generation lasts as long as a test wants it to."""
    path = tmp_path_factory.mktemp("models") / "long"
    shutil.copytree(tiny, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    return path


@pytest.fixture(scope="session")
def talking(long: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a chat template: "w1" and "w2" around what the user says, "w3" and "w2" around answers."""
    path = tmp_path_factory.mktemp("models") / "talking"
    shutil.copytree(long, path)
    (path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ {'system': 'w4', 'user': 'w1', 'assistant': 'w3'}[message.role] }} "
        "{{ message.content }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    )
    return path


@pytest.fixture(scope="session")
def worker(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a worker that serves the tiny model in float32."""
    address = f"ipc://{tmp_path_factory.mktemp('worker')}/worker.ipc"
    process = subprocess.Popen(
        [*LLAMA, "worker", "--bind", address, "--model", str(tiny)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready")
    yield address
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    process.stdout.close()
