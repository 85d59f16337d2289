"""Several sessions in one call to a worker: each gets what it gets alone, and what does not fit together is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shmtransport import Client, RemoteError
from tests.support.llamas import Small, Worker

COUNTS = (3, 1, 5)
SESSIONS = (71, 72, 73)


@pytest.fixture
def client(plain_worker: Worker) -> Iterator[Client]:
    with Client(plain_worker.address) as connected:
        yield connected


def hidden(plain: Small, tokens: int, seed: int) -> torch.Tensor:
    """Embeddings [1, tokens, hidden] of some text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, plain.unsplit.config.hidden_size, generator=generator)


def alone(client: Client, session: int, given: torch.Tensor, past: int) -> torch.Tensor:
    """The logits of the last token of a forward of one session."""
    positions = torch.arange(past, past + given.shape[1])[None]
    start = {"positions": positions, "padding": None, "past": past, "select": None}
    result: torch.Tensor = client.call("stack", given, session=session, start=start, keep=1)
    return result.clone()


def together(client: Client, given: list[torch.Tensor], past: list[int], **changed: Any) -> torch.Tensor:
    """The logits of the last token of each session; some of the call's keywords may be changed."""
    counts = [one.shape[1] for one in given]
    positions = torch.cat([torch.arange(first, first + count) for first, count in zip(past, counts, strict=True)])[None]
    start = {"positions": positions, "tokens": counts, "past": past, **changed.pop("start", {})}
    ends = torch.tensor(counts).cumsum(0) - 1
    keywords = {"session": list(SESSIONS), "start": start, "keep": ends.tolist(), **changed}
    result: torch.Tensor = client.call("stack", torch.cat(given, dim=1), **keywords)
    return result.clone()


def test_each_session_gets_what_it_gets_alone(plain: Small, client: Client) -> None:
    """A first forward of all, a second one of all, and one that goes back in one of them."""
    first = [hidden(plain, count, count) for count in COUNTS]
    second = [hidden(plain, 1, 10 + count) for count in COUNTS]
    steps = [(first, [0, 0, 0]), (second, list(COUNTS)), (second, [COUNTS[0] + 1, 0, COUNTS[2]])]
    for given, past in steps:
        found = together(client, given, past)
        for index, (one, before) in enumerate(zip(given, past, strict=True)):
            wanted = alone(client, index + 1, one, before)
            torch.testing.assert_close(found[:, index], wanted[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"session": []},
        {"session": [71, 71, 73]},
        {"session": [71, 72]},
        {"session": [71, [72], 73]},
        {"start": {"tokens": [3, 1, 4]}},
        {"start": {"tokens": [3, 0, 6]}},
        {"start": {"tokens": [3, -1, 7]}},
        {"start": {"tokens": [3.0, 1, 5]}},
        {"start": {"tokens": [9]}},
        {"start": {"tokens": 9}},
        {"start": {"past": [0, 0]}},
        {"start": {"past": [0, -1, 0]}},
        {"start": {"past": [0, 10**15, 0]}},
        {"start": {"positions": torch.arange(8)[None]}},
        {"start": {"positions": torch.arange(9)}},
        {"start": {"positions": torch.zeros(1, 9)}},
        {"start": {"lengths": torch.arange(4)}},
        {"keep": [9]},
        {"keep": [-1]},
        {"keep": [1.5]},
        {"keep": list(range(9)) * 2},
        {"keep": 10},
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(plain: Small, client: Client, changed: dict[str, Any]) -> None:
    """An error of the handler; after it the same sessions go on."""
    given = [hidden(plain, count, count) for count in COUNTS]
    wanted = together(client, given, [0, 0, 0])
    with pytest.raises(RemoteError):
        together(client, given, [0, 0, 0], **changed)
    torch.testing.assert_close(together(client, given, [0, 0, 0]), wanted)


def test_more_sessions_than_a_client_may_have_are_refused(plain: Small, client: Client) -> None:
    """The limit holds for a list of them as well."""
    given = hidden(plain, 100, 1)
    start = {"positions": torch.arange(100)[None], "tokens": [1] * 100, "past": [0] * 100}
    with pytest.raises(RemoteError, match="this client has 64 KV sessions"):
        client.call("stack", given, session=list(range(1000, 1100)), start=start, keep=[0])
