"""The HTTP side: OpenAI's paths, by FastAPI."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from openai.types import Model
from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import Answer
from .errors import BodyTooLarge, Failed, NotFound, RequestRefused, Unauthorized
from .metrics import Metrics
from .replies import usage
from .requests import ChatRequest, CommonRequest, CompletionRequest, parsed
from .service import Job, Parts, Service

logger = logging.getLogger("llama_split")

MOST_BODY_BYTES = 8 << 20
_DONE = "[DONE]"
_PAGE = Path(__file__).with_name("page.html")


class Paths:
    """What is answered at each path.

    Args:
        service: the served model.
        metrics: what is counted.
    """

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service = service
        self._metrics = metrics
        self._started = int(time.time())

    async def health(self) -> Response:
        """Whether requests can be answered: status 200, or 503 with the reason."""
        reason = await self._service.unavailable()
        engine = self._service.engine
        facts = {"status": "unavailable" if reason else "ok", "running": engine.running, "waiting": engine.waiting}
        return JSONResponse({**facts, "reason": reason} if reason else facts, 503 if reason else 200)

    async def page(self) -> Response:
        """A page to try it by hand."""
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"))

    async def about(self) -> Response:
        """How the model is split, what the worker sees of it, and the transport's totals."""
        model = self._service.model
        transport = model.statistics()
        return JSONResponse(
            {
                "model": self._service.name,
                "mode": model.mode.value,
                "revealed": model.revealed,
                "transport": {"calls": transport.calls, "call_seconds": transport.call_seconds},
            }
        )

    async def metrics(self) -> Response:
        """The totals, for Prometheus."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> Response:
        """The one model that there is, in a list."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        """The model of this name."""
        self._service.check_name(name)
        return JSONResponse(self._model())

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        asked = parsed(ChatRequest, await _body(request))
        return await self._answer(request, asked, self._service.chat(asked))

    async def text(self, request: Request) -> Response:
        """Continue a plain text."""
        asked = parsed(CompletionRequest, await _body(request))
        return await self._answer(request, asked, self._service.text(asked))

    def _model(self) -> dict[str, Any]:
        name = self._service.name
        return Model(id=name, created=self._started, object="model", owned_by="llama-split").model_dump()

    async def _answer(self, request: Request, asked: CommonRequest, job: Job) -> Response:
        began = time.perf_counter()
        self._metrics.prompt_tokens.inc(job.prompt_tokens)
        parts = _timed(self._service.parts(job), self._metrics, began)
        if asked.stream:
            messages = _messages(asked, job, parts, self._metrics)
            # What refuses the request is raised before the reply has begun.
            first = await _unless_gone(request, anext(messages))
            return EventSourceResponse(_events(first, messages))
        return JSONResponse(await _unless_gone(request, _whole(job, parts, self._metrics)))


class Counted:
    """Counts the responses of an application, by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, count if scope["type"] == "http" else send)


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The application.

    Args:
        service: the served model.
        api_key: what clients must send as a bearer token; None: nothing.
    """

    async def check_key(request: Request) -> None:
        _check_key(request, api_key)

    AppStatus.enable_automatic_graceful_drain = False  # a server that ends lets streams finish, for as long as it says
    app = FastAPI(title="llama-split", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(service)
    paths = Paths(service, metrics)
    guarded: dict[str, Any] = {"dependencies": [Depends(check_key)], "response_model": None}
    app.add_api_route("/", paths.page, response_model=None)
    app.add_api_route("/about", paths.about, **guarded)
    app.add_api_route("/health", paths.health, response_model=None)
    app.add_api_route("/metrics", paths.metrics, **guarded)
    app.add_api_route("/v1/models", paths.models, **guarded)
    app.add_api_route("/v1/models/{name:path}", paths.model, **guarded)
    app.add_api_route("/v1/chat/completions", paths.chat, methods=["POST"], **guarded)
    app.add_api_route("/v1/completions", paths.text, methods=["POST"], **guarded)
    app.add_exception_handler(RequestRefused, _refuse)
    app.add_exception_handler(404, _not_found)
    app.add_exception_handler(Exception, _failed)
    known = frozenset(route.path for route in app.routes if isinstance(route, APIRoute))
    app.add_middleware(Counted, metrics=metrics, paths=known)
    return app


async def _refuse(_request: Request, error: Exception) -> Response:
    refused = error if isinstance(error, RequestRefused) else Failed(str(error))
    return JSONResponse(refused.body(), refused.status)


async def _not_found(request: Request, _error: Exception) -> Response:
    return await _refuse(request, NotFound(f"there is no {request.url.path} here"))


async def _failed(request: Request, error: Exception) -> Response:
    logger.error("a request for %s failed", request.url.path, exc_info=error)
    return await _refuse(request, Failed("this server failed; its log says why"))


def _check_key(request: Request, api_key: str | None) -> None:
    if api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), api_key.encode()):
        raise Unauthorized("this server wants its key as a bearer token (Authorization: Bearer …)")


async def _body(request: Request) -> bytes:
    """A request's body, if it is not too large."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY_BYTES:
            raise BodyTooLarge(f"the request has more than {MOST_BODY_BYTES} bytes")
    return bytes(body)


async def _timed(parts: Parts, metrics: Metrics, began: float) -> Parts:
    """The same parts, the first of which is timed."""
    async with contextlib.aclosing(parts):
        is_first = True
        async for numbered in parts:
            if is_first:
                metrics.first_token.observe(time.perf_counter() - began)
                is_first = False
            yield numbered


async def _whole(job: Job, parts: Parts, metrics: Metrics) -> dict[str, Any]:
    answers = [Answer(probabilities=None if one.sampling.top_logprobs is None else []) for one in job.orders]
    async with contextlib.aclosing(parts):
        async for number, part in parts:
            answers[number].add(part)
    metrics.answer_tokens.inc(sum(answer.tokens for answer in answers))
    return job.reply.whole(answers, job.prompt_tokens)


async def _messages(
    asked: CommonRequest, job: Job, parts: Parts, metrics: Metrics
) -> AsyncGenerator[dict[str, Any], None]:
    """The messages of a stream, in order."""
    tokens, first = 0, True
    async with contextlib.aclosing(parts):
        async for number, part in parts:
            if first:
                first = False
                for index in range(len(job.orders)):
                    beginning = job.reply.first(index)
                    if beginning is not None:
                        yield beginning
            tokens += part.tokens
            metrics.answer_tokens.inc(part.tokens)
            yield job.reply.part(number, part)
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield job.reply.total(usage(job.prompt_tokens, tokens))


async def _events(
    first: dict[str, Any], messages: AsyncGenerator[dict[str, Any], None]
) -> AsyncGenerator[dict[str, str], None]:
    """Server-sent events; an error in the middle is the last of them."""
    async with contextlib.aclosing(messages):
        yield {"data": json.dumps(first)}
        try:
            async for message in messages:
                yield {"data": json.dumps(message)}
        except RequestRefused as error:
            yield {"data": json.dumps(error.body())}
            return
        yield {"data": _DONE}


async def _unless_gone(request: Request, work: Any) -> Any:
    """Do the work of a request, or end it when its client has gone."""
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Failed("the client has gone")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
