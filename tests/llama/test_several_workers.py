"""Several workers share the layers of a model: the tokens stay the same, and each holds and replays only its part."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from llama_split import SplitLlamaForCausalLM, WorkerMismatch
from llama_split.boundary.choices import NamedDtype
from llama_split.boundary.geometry import Geometry
from llama_split.boundary.operations import Mode
from llama_split.boundary.traffic import forward_sizes, forward_traffic
from llama_split.checkpoint import open_checkpoint
from llama_split.commands.footprint import footprint
from llama_split.worker.weights import Weights
from shmtransport import Client, LocalProtocolError, RemoteError
from tests.support.children import Mother
from tests.support.llamas import Small, Worker, worker_in_thread
from tests.support.workers import Workers, killing

LAYERS = 5
SHARES = (range(2), range(2, 3), range(3, 5))
MODES = [mode.value for mode in Mode]


@pytest.fixture(scope="module")
def deep(save_small: Any) -> Small:
    """A small model with layers enough for three workers."""
    return save_small(seed=11, num_hidden_layers=LAYERS)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def sharing(deep: Small) -> Iterator[list[Worker]]:
    """Three workers that share its layers; the first one holds the embedding."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(worker_in_thread(deep.path, layers=layers, embedding=layers.start == 0))
            for layers in SHARES
        ]


def opened(deep: Small, workers: Sequence[Worker], mode: str, **options: Any) -> SplitLlamaForCausalLM:
    """The model, split among these workers."""
    addresses = [worker.address for worker in workers]
    return SplitLlamaForCausalLM.from_pretrained(deep.path, worker=addresses, mode=mode, **options)


def counting(split: SplitLlamaForCausalLM) -> Counter[int]:
    """Count the calls over a session's KV at each worker from now on, by its index."""
    calls: Counter[int] = Counter()

    def counted(index: int, client: Client) -> None:
        submit = client.submit

        def counting_submit(method: str, *arguments: Any, **keywords: Any) -> Any:
            calls[index] += method in ("layer", "layers", "stack")
            return submit(method, *arguments, **keywords)

        client.submit = counting_submit  # type: ignore[method-assign]

    for index, worker in enumerate(split.workers):
        counted(index, worker.client)
    return calls


def prompt(tokens: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(5, 90, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("pipeline", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_the_unsplit_model(deep: Small, sharing: list[Worker], mode: str, pipeline: int) -> None:
    """Greedy and by beams, which select rows at every worker; with a prompt in one piece, or in nine."""
    ids = prompt(150)
    with opened(deep, sharing, mode, pipeline=pipeline) as split:
        for options in ({}, {"num_beams": 3}):
            wanted = deep.unsplit.generate(ids, max_new_tokens=8, do_sample=False, **options)
            assert split.generate(ids, max_new_tokens=8, do_sample=False, **options).tolist() == wanted.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_the_traffic_is_what_is_stated(deep: Small, sharing: list[Worker], mode: str) -> None:
    """Calls and bytes of a forward at all workers together are those that ``llama-split info`` computes."""
    geometry = Geometry.of(deep.unsplit.config)
    sizes = forward_sizes(geometry, 20, logits=1)
    wanted = forward_traffic(Mode(mode), geometry, sizes, NamedDtype("float32", 4), len(SHARES))
    with opened(deep, sharing, mode) as split:
        before = split.statistics()
        split(prompt(20, rows=1), logits_to_keep=1)
        after = split.statistics()
    found = (
        after.calls - before.calls,
        after.tensor_bytes_sent - before.tensor_bytes_sent,
        after.tensor_bytes_received - before.tensor_bytes_received,
    )
    assert found == (wanted.calls, wanted.sent, wanted.received)


@pytest.mark.parametrize("mode", ["layer", "stack"])
@pytest.mark.parametrize("lost", range(len(SHARES)))
def test_a_lost_worker_costs_no_token_and_only_those_before_it_a_replay(
    llama_mother: Mother, deep: Small, sharing: list[Worker], tmp_path: Any, mode: str, lost: int
) -> None:
    """A worker that is killed twice: what the later workers keep stays, and their calls are those of the forwards."""
    held = SHARES[lost]
    mortal = Workers(llama_mother, deep.path, f"ipc://{tmp_path}/w.ipc", f"{held.start}-{held.stop - 1}")
    mortal.start()
    addresses = [worker.address for worker in sharing]
    addresses[lost] = mortal.address
    ids, tokens = prompt(20), 9
    wanted = deep.unsplit.generate(ids, max_new_tokens=tokens, do_sample=False)

    def kill() -> None:
        mortal.kill()
        mortal.start()

    with SplitLlamaForCausalLM.from_pretrained(deep.path, worker=addresses, mode=mode) as split:
        a_forward = [1 if mode == "stack" else len(layers) for layers in SHARES]
        kills = killing(split, kill, every=3 * a_forward[lost] + 1, worker=lost)
        calls = counting(split)
        assert split.generate(ids, max_new_tokens=tokens, do_sample=False).tolist() == wanted.tolist()
        assert len(kills) >= 2
        assert split.workers.epochs == [len(kills) if index == lost else 0 for index in range(len(SHARES))]
        for index in range(lost + 1, len(SHARES)):
            assert calls[index] == tokens * a_forward[index]
        for index in range(lost):  # each forward that was repeated, and each replay
            assert calls[index] == (tokens + 2 * len(kills)) * a_forward[index]
    mortal.stop()


@pytest.mark.parametrize("mode", ["op", "fused"])
def test_where_this_side_attends_a_lost_worker_repeats_one_call(
    llama_mother: Mother, deep: Small, sharing: list[Worker], tmp_path: Any, mode: str
) -> None:
    """The KV is here: nothing is replayed, at any worker."""
    mortal = Workers(llama_mother, deep.path, f"ipc://{tmp_path}/w.ipc", "2-2")
    mortal.start()
    ids = prompt(70)
    wanted = deep.unsplit.generate(ids, max_new_tokens=6, do_sample=False)

    def kill() -> None:
        mortal.kill()
        mortal.start()

    addresses = [sharing[0].address, mortal.address, sharing[2].address]
    with SplitLlamaForCausalLM.from_pretrained(deep.path, worker=addresses, mode=mode, pipeline=2) as split:
        kills = killing(split, kill, every=10, worker=1)
        assert split.generate(ids, max_new_tokens=6, do_sample=False).tolist() == wanted.tolist()
        assert split.workers.epochs == [0, len(kills), 0]
        assert kills
    mortal.stop()


def test_a_conversation_goes_on_after_a_forward_that_failed_at_the_last_worker(
    deep: Small, sharing: list[Worker]
) -> None:
    """The first workers have gone further than the cache says; they continue where it says."""
    ids = prompt(24, rows=1)
    with opened(deep, sharing, "stack") as split:
        cache = split.new_cache()
        split(ids[:, :10], past_key_values=cache)
        last = split.workers.last.client
        submit = last.submit
        last.submit = lambda *_arguments, **_keywords: submit("no_such_method")  # type: ignore[method-assign]
        with pytest.raises(LocalProtocolError, match="no_such_method"):
            split(ids[:, 10:20], past_key_values=cache)
        last.submit = submit  # type: ignore[method-assign]
        assert cache.get_seq_length() == 10
        found = split(ids[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(found, deep.unsplit(ids).logits[:, 10:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chosen", [(0, 2), (0, 1), (1, 0, 2), (0, 0, 1, 2), (2,)], ids=str)
def test_workers_that_dont_hold_each_layer_once_are_refused(
    deep: Small, sharing: list[Worker], chosen: tuple[int, ...]
) -> None:
    """A gap, no end, another order, twice, no beginning: the error lists what each holds."""
    with pytest.raises(WorkerMismatch, match=r"the workers hold layers .*each layer must be held once"):
        opened(deep, [sharing[index] for index in chosen], "fused")


def test_mode_op_needs_the_embedding_at_one_of_them(deep: Small, sharing: list[Worker]) -> None:
    """Without it the error says how to start a worker."""
    with (
        worker_in_thread(deep.path, layers=range(3), embedding=False) as first,
        pytest.raises(WorkerMismatch, match=r"holds no embedding.*--embedding"),
    ):
        opened(deep, [first, sharing[2]], "op")


def test_a_worker_with_other_layers_does_not_take_over(
    llama_mother: Mother, deep: Small, sharing: list[Worker], tmp_path: Any
) -> None:
    """A worker that is started again with other layers is refused, by the option that is needed."""
    right, wrong = (Workers(llama_mother, deep.path, f"ipc://{tmp_path}/w.ipc", layers) for layers in ("0-1", "0-2"))
    right.start()
    addresses = [right.address, sharing[1].address, sharing[2].address]
    with SplitLlamaForCausalLM.from_pretrained(deep.path, worker=addresses, mode="fused") as split:
        split(prompt(4))
        right.kill()
        wrong.start()
        with pytest.raises(WorkerMismatch, match=r"now holds layers 0-2; .*start it with --layers 0-1"):
            split(prompt(4))
    right.stop()
    wrong.stop()


def test_a_worker_refuses_what_it_does_not_hold(deep: Small, sharing: list[Worker]) -> None:
    """Another worker's layer, and the output matrix: errors of the handler, which cost nothing else."""
    hidden = torch.zeros(1, 1, deep.unsplit.config.hidden_size)
    with Client(sharing[1].address) as client:
        for layer in (1, 3, -1, 99):
            with pytest.raises(RemoteError, match=f"layer {layer} is asked for; this worker holds 2-2"):
                client.call("qkv", hidden, layer=layer)
        for method in ("lm_head", "stack"):
            with pytest.raises(RemoteError, match="this worker holds layers 2-2 and no output matrix"):
                client.call(method, hidden, **({"session": 1, "start": {}, "keep": 1} if method == "stack" else {}))
        assert client.call("qkv", hidden, layer=2).shape[-1] > 0


@pytest.mark.parametrize("mode", list(Mode), ids=str)
def test_each_worker_holds_the_weights_that_are_stated(deep: Small, mode: Mode) -> None:
    """The bytes of each share of ``llama-split info`` are those of the weights that such a worker loads."""
    checkpoint = open_checkpoint(str(deep.path))
    float32 = NamedDtype("float32", 4)
    shares = footprint(checkpoint.outline, mode, float32, float32, 10, (None, None, None)).shares
    assert [share.layers.start for share in shares] == [0, *(share.layers.stop for share in shares[:-1])]
    for share in shares:
        embedding = mode is Mode.OP and share.layers.start == 0
        weights = Weights(checkpoint, torch.float32, torch.device("cpu"), embedding=embedding, layers=share.layers)
        assert weights.nbytes == share.weights
