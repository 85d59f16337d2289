"""The server, by OpenAI's own clients: right answers, many at once, and refusals in the form that clients read."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
import torch

from tests.support.helpers import eventually

from .conftest import KEY, Served, Speaking

PROMPTS = [f"w{number} w{2 * number + 3} w{3 * number % 150}" for number in range(1, 9)]


def _chat(prompt: str, **options: Any) -> dict[str, Any]:
    return {"model": "speaking", "messages": [{"role": "user", "content": prompt}], "temperature": 0, **options}


def _rendered(prompt: str) -> str:
    """What the model's template makes of a chat with this one message."""
    return f"{prompt} w1"


def _idle(served: Served) -> bool:
    return (served.service.engine.running, served.service.engine.waiting) == (0, 0)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered(served: Served, speaking: Speaking) -> None:
    """As the unsplit model does, with the number of tokens and the reason for its end."""
    reply = served.client().chat.completions.create(**_chat("w5 w6", max_tokens=7))
    assert reply.choices[0].message.content == speaking.answer(_rendered("w5 w6"), 7)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (3, 7, 10)
    assert reply.model == "speaking"


def test_a_stream_is_the_same_answer_in_parts(served: Served, speaking: Speaking) -> None:
    """Role first, then a part for each token, the reason last; usage where it is asked for, without choices."""
    stream = served.client().chat.completions.create(
        **_chat("w5 w6", max_completion_tokens=7), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == speaking.answer(_rendered("w5 w6"), 7)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert len(chunks) >= 7
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7
    assert len({chunk.id for chunk in chunks}) == 1


def test_many_at_once_get_what_each_gets_alone(served: Served, speaking: Speaking) -> None:
    """Eight clients, half of them streaming, with answers of different lengths."""

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        options = _chat(PROMPTS[number], max_tokens=5 + 3 * number)
        if number % 2:
            stream = await client.chat.completions.create(**options, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        reply = await client.chat.completions.create(**options)
        return reply.choices[0].message.content or ""

    async def ask_all() -> list[str]:
        async with served.async_client() as client:
            return await asyncio.gather(*(ask(client, number) for number in range(8)))

    expected = [speaking.answer(_rendered(prompt), 5 + 3 * number) for number, prompt in enumerate(PROMPTS)]
    assert asyncio.run(ask_all()) == expected


def test_plain_texts_are_continued(served: Served, speaking: Speaking) -> None:
    """Several prompts and several answers to each; tokens in place of text; streamed as well."""
    client = served.client()
    reply = client.completions.create(model="speaking", prompt=["w7 w8", "w9"], n=2, max_tokens=4, temperature=0)
    expected = [speaking.answer(prompt, 4) for prompt in ("w7 w8", "w7 w8", "w9", "w9")]
    assert [choice.text for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    by_tokens = client.completions.create(model="speaking", prompt=[7, 8], max_tokens=4, temperature=0)
    assert by_tokens.choices[0].text == expected[0]
    parts = list(client.completions.create(model="speaking", prompt="w9", max_tokens=4, temperature=0, stream=True))
    assert "".join(part.choices[0].text for part in parts) == expected[2]
    assert parts[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_an_answer(served: Served, speaking: Speaking, stream: bool) -> None:
    """Also across two tokens; nothing of it is part of the text."""
    whole = speaking.answer(_rendered("w5 w6"), 12)
    words = whole.split(" ")
    stop = f"{words[4][-1]} {words[5]}"
    options = _chat("w5 w6", max_tokens=12, stop=["never", stop])
    found: Any = served.client().chat.completions.create(**options, stream=stream)
    if stream:
        chunks = list(found)
        text, reason = (
            "".join(one.choices[0].delta.content or "" for one in chunks),
            chunks[-1].choices[0].finish_reason,
        )
    else:
        text, reason = found.choices[0].message.content, found.choices[0].finish_reason
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"
    assert eventually(lambda: _idle(served)), "the rest is still being generated"


def test_a_seed_gives_the_same_answer_alone_and_among_others(served: Served) -> None:
    """And several answers to one request differ."""

    async def ask(client: openai.AsyncOpenAI, seed: int) -> list[str | None]:
        options = {**_chat("w5 w6", max_tokens=8, n=2), "temperature": 1.5, "seed": seed}
        reply = await client.chat.completions.create(**options)
        return [choice.message.content for choice in reply.choices]

    async def ask_all() -> None:
        async with served.async_client() as client:
            alone = await ask(client, 42)
            among = await asyncio.gather(ask(client, 1), ask(client, 42), ask(client, 2))
        assert among[1] == alone
        assert len({*alone, *among[0], *among[2]}) == 6

    asyncio.run(ask_all())


def test_probabilities_are_those_of_the_unsplit_model(served: Served, speaking: Speaking) -> None:
    """Of each token and of the likeliest ones in its place."""
    options = _chat("w5 w6", max_tokens=3, logprobs=True, top_logprobs=2)
    reply = served.client().chat.completions.create(**options)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    ids = torch.tensor([[5, 6, 1]])
    for found in logprobs.content:
        expected = torch.log_softmax(speaking.unsplit(ids).logits[0, -1].detach(), -1)
        best = torch.topk(expected, 2)
        assert [one.token for one in found.top_logprobs] == [f"w{token}" for token in best.indices.tolist()]
        assert [one.logprob for one in found.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert found.logprob == pytest.approx(float(best.values[0]), abs=1e-3)
        ids = torch.cat([ids, best.indices[:1, None]], dim=1)


def test_tools_reach_the_template(served: Served, speaking: Speaking) -> None:
    """Unless the client says that none is to be used; fields that are not known are tolerated."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for choice, rendered in (("auto", "w5 w9 w1"), ("none", "w5 w1")):
        options = _chat("w5", max_tokens=4, tools=tools, tool_choice=choice, user="someone", store=False)
        reply = served.client().chat.completions.create(**options)
        assert reply.choices[0].message.content == speaking.answer(rendered, 4)


def test_the_model_is_listed(served: Served) -> None:
    """Under the name that requests use."""
    client = served.client()
    assert [model.id for model in client.models.list()] == ["speaking"]
    assert client.models.retrieve("speaking").owned_by == "llama-split"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("another")


# --- refusals ---------------------------------------------------------------------------------------------------------


def _post(
    served: Served, body: bytes, path: str = "/v1/chat/completions", key: str = KEY
) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    status, told = served.ask("POST", path, body, **headers)
    return status, json.loads(told)


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"model": "another"}, 404, "model", "model_not_found"),
        ({"messages": []}, 400, "messages", None),
        ({"messages": "w1"}, 400, "messages", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", None),
        ({"max_tokens": 0}, 400, "max_tokens", None),
        ({"max_tokens": 5000}, 400, "messages", "context_length_exceeded"),
        ({"temperature": -1}, 400, "temperature", None),
        ({"top_p": 0}, 400, "top_p", None),
        ({"n": 100}, 400, "n", None),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", None),
        ({"stop": [""]}, 400, "stop", None),
        ({"logit_bias": {"160": 1}}, 400, "logit_bias", None),
        ({"top_logprobs": 2}, 400, "top_logprobs", None),
        ({"response_format": {"type": "yaml"}}, 400, "response_format", None),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format", None),
        ({"presence_penalty": 3}, 400, "presence_penalty", None),
        ({"stream": "perhaps"}, 400, "stream", None),
    ],
    ids=str,
)
def test_a_request_that_is_wrong_is_told_what(
    served: Served, change: dict[str, Any], status: int, param: str, code: str | None
) -> None:
    """By the field that is wrong, in OpenAI's form; streaming or not, before anything is generated."""
    for stream in (False, True):
        body = {**_chat("w1"), "stream": stream, **change}
        found, told = _post(served, json.dumps(body).encode())
        assert found == status
        assert (told["error"]["param"], told["error"]["code"]) == (param, code)
        assert told["error"]["message"]
    assert _idle(served)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'{"messages": 1e999}', b"[" * 10_000])
def test_a_body_that_is_no_request_is_refused(served: Served, body: bytes) -> None:
    """Whatever bytes it has."""
    status, told = _post(served, body)
    assert status == 400
    assert told["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_large_is_not_read_to_its_end(served: Served) -> None:
    """Status 413, with the limit."""
    status, told = _post(served, b" " * (8 << 20) + b"{}")
    assert status == 413
    assert str(8 << 20) in told["error"]["message"]


def test_only_those_with_the_key_are_answered(served: Served) -> None:
    """Status 401 for all paths but the health check and the page itself."""
    for wrong in ("", KEY[:-1], KEY + "é"):
        status, told = _post(served, b"{}", key=wrong.encode().decode("latin1"))
        assert (status, told["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        served.client(api_key="another").models.list()


def test_an_unknown_path_is_404(served: Served) -> None:
    """With the path in the error."""
    status, told = _post(served, b"{}", path="/v1/embeddings")
    assert status == 404
    assert "/v1/embeddings" in told["error"]["message"]


def test_when_too_many_wait_the_next_is_refused(serve_with: Callable[..., Served], speaking: Speaking) -> None:
    """Status 429 at once; those that wait are answered."""
    served = serve_with(waiting=2)

    async def ask_all() -> list[Any]:
        async with served.async_client() as client:
            asked = (client.chat.completions.create(**_chat(prompt, max_tokens=30)) for prompt in PROMPTS * 3)
            return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(ask_all())
    refused = [one for one in found if isinstance(one, openai.RateLimitError)]
    answered = [(prompt, one) for prompt, one in zip(PROMPTS * 3, found, strict=True) if one not in refused]
    assert refused
    assert answered
    for prompt, reply in answered:
        assert reply.choices[0].message.content == speaking.answer(_rendered(prompt), 30)
    assert eventually(lambda: _idle(served))


# --- clients that go away, and what is counted ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_generation(served: Served, stream: bool) -> None:
    """In the middle of an answer: the scheduler forgets the request, and its KV is free."""
    connection = served.connection()
    body = json.dumps({**_chat("w1", max_tokens=1000), "stream": stream})
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"})
    assert eventually(lambda: served.service.engine.running == 1)
    connection.close()
    assert eventually(lambda: _idle(served))


def test_a_client_that_goes_away_before_the_first_token_ends_its_request(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waits for others, streaming or not: nothing of it stays in the queue."""
    may_go_on = threading.Event()
    forward = served.service.model.forward

    def held(*arguments: Any, **keywords: Any) -> Any:
        assert may_go_on.wait(30.0)
        return forward(*arguments, **keywords)

    monkeypatch.setattr(served.service.model, "forward", held)
    for stream in (False, True):
        connection = served.connection()
        body = json.dumps({**_chat("w1", max_tokens=1000), "stream": stream})
        connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"})
        assert eventually(lambda: served.service.engine.waiting == 1)
        connection.close()
        assert eventually(lambda: _idle(served)), "it waits on although its client has gone"
    may_go_on.set()


def test_metrics_count_what_was_done(serve_with: Callable[..., Served]) -> None:
    """Requests by path and status, tokens, and the transport's own totals."""
    served = serve_with()
    served.client().chat.completions.create(**_chat("w5 w6", max_tokens=7))
    _post(served, b"{", path="/v1/completions")
    _, text = served.ask("GET", "/metrics", Authorization=f"Bearer {KEY}")
    values = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    assert values['llama_split_requests_total{path="/v1/chat/completions",status="200"}'] == "1.0"
    assert values['llama_split_requests_total{path="/v1/completions",status="400"}'] == "1.0"
    assert values["llama_split_prompt_tokens_total"] == "3.0"
    assert values["llama_split_answer_tokens_total"] == "7.0"
    assert float(values["llama_split_first_token_seconds_count"]) == 1
    assert float(values['shmtransport_calls_total{name="worker",role="client"}']) > 0
