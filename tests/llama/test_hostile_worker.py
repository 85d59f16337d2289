"""A worker that is broken, hostile or none at all is noticed before what it says is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama_split import SplitLlamaForCausalLM, WorkerMismatch
from llama_split.checkpoint import open_checkpoint
from llama_split.operations import GATE_UP, OPERATIONS, Mode
from llama_split.worker.sessions import SessionLimits
from shmtransport import RemoteError, Server

from .conftest import Small, Worker
from .hollow import hollow_handlers
from .prompts import prompt

Serve = Callable[..., Server]


def _liar(small: Small, answer: Callable[[torch.Tensor], Any]) -> dict[str, Callable[..., Any]]:
    """Handlers of a worker that describes itself rightly, and answers with what ``answer`` makes of a right result."""
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
    """What is no description of a worker is one clear error, not a traceback."""
    serve(describe=lambda: description)
    with pytest.raises(WorkerMismatch, match="does not describe itself"):
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=address)


def test_another_kind_of_server_is_no_worker(plain: Small, serve: Serve, address: str) -> None:
    """A server of this transport that knows nothing of Llamas is named as such."""
    serve(echo=lambda value: value)
    with pytest.raises(WorkerMismatch, match="is no worker of llama-split"):
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=address)


def test_a_client_can_not_open_sessions_without_bound(
    plain_worker: Worker, layer_split: SplitLlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client's KV sessions are limited, and the error says so; ending one makes room."""
    monkeypatch.setattr(plain_worker.service.sessions, "_limits", SessionLimits(max_sessions_per_client=2))
    caches = [layer_split.new_cache() for _ in range(3)]
    for cache in caches[:2]:
        layer_split(prompt(3), past_key_values=cache)
    with pytest.raises(RemoteError, match="2 KV sessions, the most"):
        layer_split(prompt(3), past_key_values=caches[2])
    del cache, caches[0]
    layer_split(prompt(3), past_key_values=caches[-1])


def test_a_cache_never_exceeds_the_models_positions(layer_split: SplitLlamaForCausalLM) -> None:
    """A client can't make the worker's KV grow beyond what the model can use."""
    positions = layer_split.config.max_position_embeddings
    with pytest.raises(RemoteError, match=f"the model has {positions} positions"):
        layer_split(prompt(positions + 1))


def test_a_forward_that_ended_half_way_shows_no_other_memory(layer_split: SplitLlamaForCausalLM) -> None:
    """After an aborted forward only what every layer has cached counts as past."""
    client, cache = layer_split.link.client, layer_split.new_cache()
    hidden = torch.zeros(1, 4, layer_split.config.hidden_size)
    start = {"positions": torch.arange(4)[None], "padding": None, "past": 0, "select": None}
    client.call("layer", hidden, layer=0, session=cache.session, start=start)
    with pytest.raises(RemoteError, match="this session has 0"):
        client.call("layer", hidden, layer=0, session=cache.session, start={**start, "past": 4})


def test_the_boundary_names_what_the_worker_is_asked_for(plain_worker: Worker) -> None:
    """The worker registers the boundary's operations and nothing else that computes."""
    registered = set(plain_worker.server._handlers)
    assert registered == {operation.name for operation in OPERATIONS} | {"describe", "end_session"}
    assert GATE_UP.name in registered
