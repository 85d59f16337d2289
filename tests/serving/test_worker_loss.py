"""A served model whose worker dies: answers stay right where it comes back, and clients are told where it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from llama_split import SplitLlamaForCausalLM
from llama_split.trusted import worker_client
from tests.support.helpers import eventually
from tests.support.workers import Workers, killing

from .conftest import Served, Speaking, serving


@pytest.fixture
def unattended(speaking: Speaking, workers: Workers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server whose worker runs, which it does not start again, and for which it does not wait long."""
    monkeypatch.setattr(worker_client, "RECONNECT_TRIES", 1)
    workers.start()
    with (
        SplitLlamaForCausalLM.from_pretrained(speaking.path, worker=workers.address, connect_timeout_s=0.3) as split,
        serving(speaking.service(split)) as served,
    ):
        yield served


def _ask(served: Served, tokens: int = 20) -> Any:
    messages: Any = [{"role": "user", "content": "w5 w6"}]
    options: dict[str, Any] = {"model": "speaking", "messages": messages, "temperature": 0, "max_tokens": tokens}
    return served.client().chat.completions.create(**options).choices[0].message.content


def _health(served: Served) -> tuple[int, dict[str, Any]]:
    status, told = served.ask("GET", "/health")
    return status, json.loads(told)


@pytest.mark.parametrize(("mode", "every"), [("fused", 60), ("stack", 6)])
def test_a_worker_killed_in_the_middle_costs_no_token(
    speaking: Speaking, workers: Workers, mode: str, every: int
) -> None:
    """Killed again and again between operations, and started again by the server."""
    workers.start()
    with (
        SplitLlamaForCausalLM.from_pretrained(
            speaking.path, worker=workers.address, revive=workers.start, mode=mode
        ) as split,
        serving(speaking.service(split)) as served,
    ):
        kills = killing(split, workers.kill, every)
        assert _ask(served) == speaking.answer("w5 w6 w1", 20)
        assert len(kills) >= 3
        assert _health(served)[0] == 200
        workers.kill()


def test_while_the_worker_is_gone_clients_are_told(unattended: Served, speaking: Speaking, workers: Workers) -> None:
    """Status 503 with the reason, by the health check as well; once it is back, requests are answered again."""
    assert _health(unattended) == (200, {"status": "ok", "running": 0, "waiting": 0})
    workers.kill()
    status, told = _health(unattended)
    assert status == 503
    assert told["status"] == "unavailable"
    assert told["reason"]
    with pytest.raises(openai.InternalServerError, match="the model can't go on") as caught:
        _ask(unattended)
    assert caught.value.status_code == 503
    workers.start()
    assert eventually(lambda: _health(unattended)[0] == 200)
    assert _ask(unattended) == speaking.answer("w5 w6 w1", 20)
    workers.kill()


def test_a_stream_that_fails_ends_with_the_error(unattended: Served, workers: Workers) -> None:
    """What was generated until then has been sent; the error is the last message."""
    stream = unattended.client().completions.create(model="speaking", prompt="w5", max_tokens=1000, stream=True)
    next(iter(stream))
    workers.kill()
    with pytest.raises(openai.APIError, match="the model can't go on"):
        for _ in stream:
            pass
