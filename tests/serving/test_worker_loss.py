"""A served model whose worker dies: answers stay right where it comes back, and clients are told where it does not."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from llama_split import SplitLlamaForCausalLM
from llama_split.serving.engine import Limits
from llama_split.serving.service import Service
from llama_split.trusted import worker_client
from tests.support.children import Mother
from tests.support.helpers import eventually
from tests.support.workers import Workers, killing

from .conftest import Served, Speaking, serving


@pytest.fixture(scope="module")
def workers(llama_mother: Mother, speaking: Speaking, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Workers of the small model, none of them started."""
    running = Workers(llama_mother, speaking.path, f"ipc://{tmp_path_factory.mktemp('workers')}/w.ipc")
    yield running
    running.stop()


def _service(speaking: Speaking, split: SplitLlamaForCausalLM) -> Service:
    return Service(split, speaking.tokenizer, "speaking", Limits(2048, 64))


def _ask(served: Served, tokens: int = 20) -> Any:
    messages: Any = [{"role": "user", "content": "w5 w6"}]
    options: dict[str, Any] = {"model": "speaking", "messages": messages, "temperature": 0, "max_tokens": tokens}
    return served.client().chat.completions.create(**options).choices[0].message.content


def _health(served: Served) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_a_worker_killed_in_the_middle_costs_no_token(speaking: Speaking, workers: Workers) -> None:
    """Killed again and again between operations, and started again by the server."""
    workers.start()
    with (
        SplitLlamaForCausalLM.from_pretrained(speaking.path, worker=workers.address, revive=workers.start) as split,
        serving(_service(speaking, split)) as served,
    ):
        kills = killing(split, workers.kill, 60)
        assert _ask(served) == speaking.answer("w5 w6 w1", 20)
        assert len(kills) >= 3
        assert _health(served)[0] == 200
        workers.kill()


def test_while_the_worker_is_gone_clients_are_told(
    speaking: Speaking, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 503 with the reason, by the health check as well; once it is back, requests are answered again."""
    monkeypatch.setattr(worker_client, "RECONNECT_TRIES", 1)
    workers.start()
    with (
        SplitLlamaForCausalLM.from_pretrained(speaking.path, worker=workers.address, connect_timeout_s=0.3) as split,
        serving(_service(speaking, split)) as served,
    ):
        assert _health(served) == (200, {"status": "ok", "running": 0, "waiting": 0})
        workers.kill()
        status, told = _health(served)
        assert status == 503
        assert told["status"] == "unavailable"
        assert told["reason"]
        with pytest.raises(openai.InternalServerError, match="the model can't go on") as caught:
            _ask(served)
        assert caught.value.status_code == 503
        workers.start()
        assert eventually(lambda: _health(served)[0] == 200)
        assert _ask(served) == speaking.answer("w5 w6 w1", 20)
        workers.kill()


def test_a_stream_that_fails_ends_with_the_error(
    speaking: Speaking, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was generated until then has been sent; the error is the last message."""
    monkeypatch.setattr(worker_client, "RECONNECT_TRIES", 1)
    workers.start()
    with (
        SplitLlamaForCausalLM.from_pretrained(speaking.path, worker=workers.address, connect_timeout_s=0.3) as split,
        serving(_service(speaking, split)) as served,
    ):
        stream = served.client().completions.create(model="speaking", prompt="w5", max_tokens=1000, stream=True)
        next(iter(stream))
        workers.kill()
        with pytest.raises(openai.APIError, match="the model can't go on"):
            for _ in stream:
                pass
