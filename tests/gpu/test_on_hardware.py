"""The rules of ``test_pinned_arenas`` and ``test_device_arenas`` on a GPU, and a split Llama with its worker there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llama_split import SplitLlamaForCausalLM
from llama_split.checkpoint.synthetic import RandomCheckpoint
from llama_split.placement.local import WorkerProcess
from shmtransport import Client
from shmtransport.units import MIB
from tests.support.cuda import Gpus
from tests.support.helpers import Spawn, eventually
from tests.support.left_behind import kill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]

DEVICE = "cuda:0"
COUNTS = (0, 1, 1000, 32 * MIB)
DTYPES = (torch.float32, torch.bfloat16, torch.bool)


@pytest.fixture
def gpus(spawn: Spawn, address: str) -> Gpus:
    """Servers on the GPU of this machine."""
    pytest.importorskip("cuda.core", reason="needs cuda-core: the extra [cuda]")
    return Gpus(spawn, address, None)


@pytest.fixture
def client(gpus: Gpus) -> Iterator[Client]:
    """A client without a GPU of a server with one, once its arenas are pinned."""
    gpus.start_server()
    with Client(gpus.address, channel="doorbell", arena_bytes=256 * MIB) as client:
        assert eventually(lambda: client.health()["device"] == "pinned", 60.0), client.health()["device"]
        yield client


@pytest.fixture
def sharing(gpus: Gpus) -> Iterator[Client]:
    """A client that shares the GPU with its server."""
    gpus.start_server()
    with Client(gpus.address, channel="doorbell", arena_bytes=256 * MIB, device=DEVICE) as client:
        assert client.device_path == "on the GPU"
        yield client


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_tensors_reach_the_gpu_and_come_back(client: Client, count: int, dtype: torch.dtype) -> None:
    """Every size and dtype crosses unchanged, from a pinned arena and to one."""
    x = (torch.arange(count) % 251).to(dtype)
    assert torch.equal(client.call("there_and_back", x), x)
    assert client.call("facts")["bounced"] == 0


def test_an_argument_is_released_behind_the_copy_that_reads_it(client: Client) -> None:
    """Memory is used again only when the GPU has read it."""
    for value in range(6):
        client.call("keep", torch.full((25 * MIB,), float(value)))
    assert [client.call("kept_again", index).unique().tolist() for index in range(6)] == [[index] for index in range(6)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS[1:])
def test_tensors_stay_on_the_gpu(sharing: Client, count: int, dtype: torch.dtype) -> None:
    """A loan and any other tensor arrive as tensors on the GPU, and results do too."""
    x = (torch.arange(count, device=DEVICE) % 251).to(dtype)
    loan = sharing.empty(x.shape, dtype, device=DEVICE).copy_(x)
    for sent in (x, loan):
        back = sharing.call("echo", sent)
        assert back.is_cuda
        assert torch.equal(back, x)
    assert sharing.call("kind", loan) == "Tensor"
    assert sharing.call("made", 5000, 9).unique().tolist() == [9]


def test_what_another_stream_computes_is_complete_when_it_arrives(sharing: Client) -> None:
    """The current stream's work is waited for, whichever it is."""
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.zeros(16 * MIB, device=DEVICE)
        for _ in range(50):
            x += 1
        assert sharing.call("echo", x).unique().tolist() == [50]


def test_a_block_is_used_again_behind_what_was_begun_with_it(sharing: Client) -> None:
    """A tensor that dies while the GPU has yet to read it keeps its memory until then."""
    for value in range(8):
        sharing.call("copy_later", torch.full((20 * MIB,), float(value), device=DEVICE))
    assert [sharing.call("kept_again", index).unique().tolist() for index in range(8)] == [
        [index] for index in range(8)
    ]


def test_a_killed_server_leaves_no_memory_on_the_gpu(gpus: Gpus) -> None:
    """What it had made for its clients is free again once they have let go of it."""
    free, _ = torch.cuda.mem_get_info(DEVICE)
    server = gpus.start_server()
    client = Client(gpus.address, arena_bytes=256 * MIB, device=DEVICE)
    kill(server)
    client.close()
    del client
    assert eventually(lambda: torch.cuda.mem_get_info(DEVICE)[0] > free - 64 * MIB, 30.0)


@pytest.mark.parametrize("mode", ["op", "fused", "layer", "stack"])
def test_a_worker_on_the_gpu_gives_the_tokens_of_one_on_the_processor(mode: str) -> None:
    """Greedy tokens in float32, of every split."""
    checkpoint = RandomCheckpoint("tinyllama-1.1b")
    options = ["--model", "tinyllama-1.1b", "--random-weights", "--embedding", "--device"]
    found = []
    for device in ("cpu", DEVICE):
        with WorkerProcess([*options, device]) as worker:
            worker.wait_until_ready()
            with SplitLlamaForCausalLM.from_pretrained(checkpoint, worker=worker.address, mode=mode) as model:
                ids = torch.arange(1, 9)[None]
                found.append(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
    assert found[0] == found[1]
