"""A split model notices a broken, hostile or false worker before it uses the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama_split import SplitLlamaForCausalLM, WorkerMismatch
from llama_split.boundary.operations import GATE_UP, OPERATIONS, Mode
from llama_split.checkpoint import open_checkpoint
from llama_split.worker.sessions import SessionLimits
from shmtransport import RemoteError, Server
from tests.support.hollow import hollow_handlers
from tests.support.llamas import Small, Worker, worker_in_thread
from tests.support.prompts import SHARED, prompt, single_prompt

Serve = Callable[..., Server]


def _liar(small: Small, answer: Callable[[torch.Tensor], Any]) -> dict[str, Callable[..., Any]]:
    """Handlers of a worker that describes itself correctly, and returns what ``answer`` makes of a correct result."""
    checkpoint = open_checkpoint(str(small.path))
    return hollow_handlers(checkpoint, torch.float32, lambda shape: answer(torch.zeros(shape)))


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(
    "wrong",
    [
        lambda right: right[..., :1],
        lambda right: right[:, :1].expand(2, *right.shape[1:]),
        lambda right: right.to(torch.float64),
        lambda right: right.tolist(),
        lambda _right: None,
    ],
    ids=["narrow", "batch", "dtype", "list", "nothing"],
)
def test_results_of_another_shape_or_kind_are_refused(
    plain: Small, serve: Serve, address: str, mode: Mode, wrong: Callable[[torch.Tensor], Any]
) -> None:
    """Nothing that a worker returns is broadcast or converted into logits."""
    serve(**_liar(plain, wrong))
    with (
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=address, mode=mode) as split,
        pytest.raises(WorkerMismatch, match="broken or hostile"),
    ):
        split(prompt(5))


@pytest.mark.parametrize("description", [None, [], {"geometry": 1}])
def test_a_server_that_describes_itself_otherwise_is_no_worker(
    plain: Small, serve: Serve, address: str, description: Any
) -> None:
    """A false description gives one clear error, not a traceback."""
    serve(describe=lambda: description)
    with pytest.raises(WorkerMismatch, match="does not describe itself"):
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=address)


def test_another_kind_of_server_is_no_worker(plain: Small, serve: Serve, address: str) -> None:
    """The error tells that the server at this address knows nothing of Llamas."""
    serve(echo=lambda value: value)
    with pytest.raises(WorkerMismatch, match="is no worker of llama-split"):
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=address)


def test_a_client_can_not_open_sessions_without_bound(
    plain_worker: Worker, layer_split: SplitLlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error for one client's KV sessions gives the limit; ending a session makes room."""
    monkeypatch.setattr(plain_worker.service.sessions, "_limits", SessionLimits(max_sessions_per_client=2))
    caches = [layer_split.new_cache() for _ in range(3)]
    for cache in caches[:2]:
        layer_split(prompt(3), past_key_values=cache)
    with pytest.raises(RemoteError, match="2 KV sessions, the most"):
        layer_split(prompt(3), past_key_values=caches[2])
    del cache, caches[0]
    layer_split(prompt(3), past_key_values=caches[-1])


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(
    "number", [float("nan"), float("inf"), -float("inf")], ids=["nan", "infinite", "minus-infinite"]
)
def test_logits_that_are_no_numbers_are_refused(
    plain: Small, serve: Serve, address: str, mode: Mode, number: float
) -> None:
    """Generation would continue with token 0, or whichever comes first; the cache is as before."""

    def answer(right: torch.Tensor) -> torch.Tensor:
        if right.shape[-1] == plain.unsplit.config.vocab_size and right.shape[1]:
            right[-1, -1, 7] = number
        return right

    serve(**_liar(plain, answer))
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=address, mode=mode) as split:
        cache = split.new_cache()
        with pytest.raises(WorkerMismatch, match="infinite or NaN: it is broken or hostile"):
            split(prompt(5), past_key_values=cache)
        assert cache.get_seq_length() == 0
        for how in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
            with pytest.raises(WorkerMismatch, match=address):
                split.generate(**single_prompt(), **SHARED, **how)


@pytest.mark.parametrize("mode", [Mode.LAYER, Mode.STACK])
def test_room_that_could_never_be_had_costs_others_nothing(plain: Small, mode: Mode) -> None:
    """The worker's limit of KV bounds a text; a longer one ends no other client's idle session."""
    limits = SessionLimits(max_kv_bytes=2 * 3 * 32 * 4 * 300, idle_s=0.0)
    with (
        worker_in_thread(plain.path, limits=limits) as worker,
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=worker.address, mode=mode) as split,
    ):
        cache = split(prompt(9), use_cache=True).past_key_values
        with pytest.raises(RemoteError, match=r"of KV, and the limit is 225\.0 KiB.*--max-kv-bytes"):
            split(prompt(400))
        assert any(session.cache.get_seq_length() == 9 for session in worker.service.sessions._sessions.values())
        split(prompt(1), past_key_values=cache)


def test_a_forward_that_ended_half_way_shows_no_other_memory(layer_split: SplitLlamaForCausalLM) -> None:
    """After an aborted forward only what every layer has cached counts as past."""
    client, cache = layer_split.workers[0].client, layer_split.new_cache()
    hidden = torch.zeros(1, 4, layer_split.config.hidden_size)
    start = {"positions": torch.arange(4)[None], "padding": None, "past": 0, "select": None}
    client.call("layer", hidden, layer=0, session=cache.session_id, start=start)
    with pytest.raises(RemoteError, match="this session has 0"):
        client.call("layer", hidden, layer=0, session=cache.session_id, start={**start, "past": 4})


def test_the_boundary_names_what_the_worker_is_asked_for(plain_worker: Worker) -> None:
    """The worker registers the boundary's operations and nothing else that computes."""
    registered = set(plain_worker.server._handlers.by_name)
    assert registered == {operation.name for operation in OPERATIONS} | {"describe", "end_session"}
    assert GATE_UP.name in registered
