"""Runs many generations at once over one split model: transformers' scheduler, as an event loop sees it.

The scheduler has a thread of its own, which runs the model. If it ends with an error, all its requests do; the next
request starts another one, since a lost worker may be back by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from ..errors import LlamaSplitError
from .sampling import KEYWORD, Choice, Sampling, TokenProbability, choosing_by_request

if TYPE_CHECKING:
    from ..trusted.model import SplitLlamaForCausalLM

PAGE_TOKENS = 32
_BATCH_TOKENS = 512
_STOP_S = 5.0
# By default the KV cache has room for as many texts of full length, but takes no more than this share of the memory.
_KV_TEXTS = 8
_KV_SHARE = 8


class EngineFailed(LlamaSplitError):
    """The model could not go on, for example since its worker is gone."""


class TooManyWaiting(LlamaSplitError):
    """As many requests as may are waiting for their first token."""


@dataclass(frozen=True)
class Limits:
    """What an engine takes on.

    ``kv_tokens`` is how many tokens the KV cache has room for, over all requests; ``waiting`` is how many requests may
    wait for their first token.
    """

    kv_tokens: int
    waiting: int


@dataclass(frozen=True)
class NewToken:
    """One token of an answer, and its probability if that was asked for."""

    token: int
    probability: TokenProbability | None


def default_kv_tokens(model: SplitLlamaForCausalLM) -> int:
    """How many tokens the KV cache has room for if nothing else was chosen."""
    geometry, positions = model.workers.geometry, int(model.config.max_position_embeddings)
    nbytes: int = 2 * geometry.layers * geometry.kv_width * model.dtype.itemsize  # keys and values of one token
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(min(_KV_TEXTS * positions, memory // _KV_SHARE // nbytes), positions // _KV_SHARE)


class Engine:
    """Generates for many requests at once.

    Args:
        model: the split model, in a mode that can batch.
        limits: what it takes on.

    Raises:
        UnsupportedBySplit: the model's mode can't batch.
    """

    def __init__(self, model: SplitLlamaForCausalLM, limits: Limits) -> None:
        self._model = model
        self._limits = limits
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._manager = self._start()
        self.running = 0
        """Requests that get tokens."""
        self.waiting = 0
        """Requests that wait for their first token."""

    def _start(self) -> Any:
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=-(-self._limits.kv_tokens // PAGE_TOKENS),
            max_batch_tokens=min(_BATCH_TOKENS, self._limits.kv_tokens),
            use_async_batching=False,
        )
        manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=config,
        )
        choosing_by_request(manager.logit_processor)
        manager.start()
        return manager

    async def generate(
        self, prompt: list[int], most_tokens: int, ends: list[int], sampling: Sampling
    ) -> AsyncGenerator[NewToken, None]:
        """Generate the tokens of one answer. Closing the generator ends the request within a step.

        Args:
            prompt: token ids.
            most_tokens: how many are generated at most.
            ends: tokens that end the answer; the one that does is generated as well.
            sampling: how tokens are chosen.

        Raises:
            TooManyWaiting: nothing was begun.
            EngineFailed: the model can't go on.
        """
        if self.waiting >= self._limits.waiting:
            raise TooManyWaiting(
                f"{self.waiting} requests wait already, and {self._limits.waiting} may: try again later, or raise "
                "--max-waiting"
            )
        manager = self._living()
        number = f"request-{next(self._numbers)}"
        results: asyncio.Queue[Any] = asyncio.Queue()
        choice = Choice(sampling)
        manager.register_result_handler(number, results.put_nowait)
        manager.add_request(
            prompt,
            request_id=number,
            max_new_tokens=most_tokens,
            streaming=True,
            eos_token_id=ends or -1,
            **{KEYWORD: choice},
        )
        self.waiting += 1
        known = 0
        finished = False
        try:
            while not finished:
                result = await self._next(results, manager)
                if result.error is not None:
                    raise _failed(result.error)
                finished = result.is_finished()
                if known == 0 and result.generated_tokens:
                    self.waiting, self.running = self.waiting - 1, self.running + 1
                while known < len(result.generated_tokens):
                    probabilities = choice.probabilities[known : known + 1]
                    known += 1
                    yield NewToken(result.generated_tokens[known - 1], probabilities[0] if probabilities else None)
        finally:
            if known:
                self.running -= 1
            else:
                self.waiting -= 1
            manager.output_router.result_handlers.pop(number, None)
            if not finished:
                manager.cancel_request(number)

    @staticmethod
    async def _next(results: asyncio.Queue[Any], manager: Any) -> Any:
        """The scheduler's next word on a request; it says nothing once it has ended."""
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(results.get(), 1.0)
            if not manager.is_running() and results.empty():
                raise _failed(str(manager.background_thread_status.fatal_error or "the scheduler has ended"))

    def _living(self) -> Any:
        """The scheduler, or another one if it has ended."""
        with self._lock:
            if not self._manager.is_running():
                self._end(self._manager)
                self._manager = self._start()
            return self._manager

    def close(self) -> None:
        """End all requests."""
        with self._lock:
            self._end(self._manager)

    @staticmethod
    def _end(manager: Any) -> None:
        manager.stop(block=True, timeout=_STOP_S, hard_stop=True)
        manager.destroy()


def _failed(reason: str) -> EngineFailed:
    return EngineFailed(f"the model can't go on: {reason}")
