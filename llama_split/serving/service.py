"""The served model: turns requests into answers, and knows how it is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shmtransport import CallTimeout, TransportError

from .answers import Answering, Order, Part
from .engine import Engine, EngineFailed, Limits, TooManyWaiting
from .errors import Busy, InvalidRequest, NotFound, RequestRefused, TooLong, Unavailable
from .forms import Form, Forms
from .replies import ChatReply, Reply, TextReply
from .requests import ChatRequest, CommonRequest, CompletionRequest

if TYPE_CHECKING:
    from ..trusted.model import SplitLlamaForCausalLM

Parts = AsyncGenerator[tuple[int, Part], None]

_PING_S = 1.0


@dataclass(frozen=True)
class Job:
    """A request in this server's terms: the answers that are asked for, in order, and the form of the reply."""

    orders: Sequence[Order]
    reply: Reply
    prompt_tokens: int


class Service:
    """One model, served.

    Args:
        model: the split model.
        tokenizer: its tokenizer.
        name: what clients call it.
        limits: what it takes on.
    """

    def __init__(self, model: SplitLlamaForCausalLM, tokenizer: Any, name: str, limits: Limits) -> None:
        self.name = name
        self.model = model
        self.engine = Engine(model, limits)
        self._tokenizer = tokenizer
        ends = _ends_of(model, tokenizer)
        self._answering = Answering(self.engine, tokenizer, ends)
        self._positions = min(int(model.config.max_position_embeddings), limits.kv_tokens)
        self._vocabulary = int(model.config.vocab_size)
        self._forms = Forms(tokenizer, self._vocabulary, ends)
        self._reviving: asyncio.Task[Any] | None = None

    def chat(self, request: ChatRequest) -> Job:
        """The job of a chat.

        Raises:
            RequestRefused: it can't be done.
        """
        self.check_name(request.model or self.name)
        messages = [message.plain() for message in request.messages]
        tools = None if request.tool_choice == "none" else request.tools
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template: use /v1/completions", "messages")
        with _refusing("the model's chat template can't render these messages", "messages"):
            prompt = self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        orders = self._orders(
            request, [list(prompt)], request.most_tokens(), request.recorded(), request.form(self._forms)
        )
        return Job(orders, ChatReply(self.name, self._tokenizer), len(prompt))

    def text(self, request: CompletionRequest) -> Job:
        """The job of a plain text.

        Raises:
            RequestRefused: it can't be done.
        """
        self.check_name(request.model or self.name)
        prompts = []
        for prompt in request.prompts():
            if isinstance(prompt, str):
                with _refusing("the model's tokenizer can't encode the prompt", "prompt"):
                    prompts.append(list(self._tokenizer(prompt)["input_ids"]))
            elif any(not 0 <= token < self._vocabulary for token in prompt):
                raise InvalidRequest(f"prompt has a token that the model's {self._vocabulary} are not", "prompt")
            else:
                prompts.append(prompt)
        orders = self._orders(request, prompts, request.max_tokens, request.logprobs)
        return Job(orders, TextReply(self.name, self._tokenizer), sum(map(len, prompts)))

    def check_name(self, wanted: str) -> None:
        """Refuse what is for another model.

        Raises:
            NotFound: this one has another name.
        """
        if wanted != self.name:
            raise NotFound(f"the model {wanted!r} is not served here; {self.name!r} is", "model")

    def _orders(
        self,
        request: CommonRequest,
        prompts: list[list[int]],
        most: int | None,
        recorded: int | None,
        form: Form | None = None,
    ) -> list[Order]:
        sampling, stops = request.sampling(recorded, form, self._vocabulary), request.stops()
        orders = []
        for prompt in prompts:
            left = self._positions - len(prompt)
            if not prompt:
                raise InvalidRequest("the prompt has no tokens", "prompt")
            if left < (most or 1):
                raise TooLong(
                    f"the prompt has {len(prompt)} tokens and the answer may have {most or 1}; together they may have "
                    f"{self._positions}: shorten one of them",
                    "messages" if isinstance(request, ChatRequest) else "prompt",
                )
            orders += [Order(prompt, most or left, stops, sampling.for_answer(number)) for number in range(request.n)]
        return orders

    async def parts(self, job: Job) -> Parts:
        """The parts of all answers of a job, each with its number, as they come.

        Raises:
            RequestRefused: the model can't answer, or too many wait.
        """
        found: asyncio.Queue[tuple[int, Part | Exception]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._answer(number, order, found)) for number, order in enumerate(job.orders)]
        left = len(tasks)
        try:
            while left:
                number, part = await found.get()
                if isinstance(part, Exception):
                    raise _refusal(part) from part
                left -= part.reason is not None
                yield number, part
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, number: int, order: Order, found: asyncio.Queue[tuple[int, Part | Exception]]) -> None:
        try:
            async with contextlib.aclosing(self._answering.parts(order)) as parts:
                async for part in parts:
                    found.put_nowait((number, part))
        except Exception as error:  # noqa: BLE001 - it is raised where the parts are taken
            found.put_nowait((number, error))

    async def unavailable(self) -> str:
        """Why this server can't answer now; empty if it can. If its worker is gone, this begins to connect again."""
        if self._reviving is not None and not self._reviving.done():
            return f"the worker at {' or '.join(self.model.workers.addresses)} is gone; connecting again"
        try:
            for worker in self.model.workers:
                await asyncio.to_thread(worker.client.with_options(timeout_s=_PING_S).call, "describe")
        except CallTimeout:
            return ""  # it is busy
        except TransportError as error:
            self._reviving = asyncio.create_task(asyncio.to_thread(self._revive))
            return str(error)
        return ""

    def _revive(self) -> None:
        with contextlib.suppress(TransportError):  # the next look shows it again
            for worker in self.model.workers:
                worker.ping()

    def close(self) -> None:
        """End all requests."""
        self.engine.close()


def _ends_of(model: SplitLlamaForCausalLM, tokenizer: Any) -> list[int]:
    """The tokens that end an answer."""
    named = model.generation_config.eos_token_id
    named = model.config.eos_token_id if named is None else named
    named = tokenizer.eos_token_id if named is None else named
    return [] if named is None else [int(token) for token in (named if isinstance(named, list) else [named])]


@contextlib.contextmanager
def _refusing(what: str, param: str) -> Any:
    """Turn what a tokenizer or a template raises, both of which come with the model, into a refusal."""
    try:
        yield
    except Exception as error:
        raise InvalidRequest(f"{what}: {error or type(error).__name__}", param) from error


def _refusal(error: Exception) -> Exception:
    if isinstance(error, RequestRefused):
        return error
    if isinstance(error, TooManyWaiting):
        return Busy(str(error))
    if isinstance(error, EngineFailed):
        return Unavailable(str(error))
    return error
