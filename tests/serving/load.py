"""Load on a server: many clients, some of which go away, while the worker is killed; every answer is checked."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import openai

from .conftest import Served, Speaking

_PROMPTS = 24
_LONGEST = 24  # tokens of an answer
_LEAVING_EVERY = 10  # the client of every tenth request goes away in the middle


@dataclass
class Totals:
    """What the clients have done; ``wrong`` are answers that differ from the unsplit model's."""

    answered: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)


class Load:
    """Clients of one server.

    Args:
        served: the server.
        speaking: its model.
        kill: kills the worker, which the server then starts again.
    """

    def __init__(self, served: Served, speaking: Speaking, kill: Callable[[], None]) -> None:
        self._served = served
        self._kill = kill
        prompts = [f"w{3 + number} w{5 * number % 150 + 2}" for number in range(_PROMPTS)]
        self._answers = {prompt: speaking.answer(prompt, _LONGEST).split(" ") for prompt in prompts}
        self.totals = Totals()
        self._asked = 0

    def run(self, clients: int, seconds: float, kills: int) -> Totals:
        """Go on for as long.

        Args:
            clients: how many there are at once.
            seconds: how long each of them goes on asking.
            kills: how often the worker is killed meanwhile.
        """
        asyncio.run(self._run(clients, seconds, kills))
        return self.totals

    async def _run(self, clients: int, seconds: float, kills: int) -> None:
        end = time.monotonic() + seconds
        async with self._served.async_client() as client:
            asking = [asyncio.create_task(self._ask(client, random.Random(seed), end)) for seed in range(clients)]
            for _ in range(kills):
                await asyncio.sleep(seconds / (kills + 1))
                await asyncio.to_thread(self._kill)
            await asyncio.gather(*asking)

    async def _ask(self, client: openai.AsyncOpenAI, chance: random.Random, end: float) -> None:
        while time.monotonic() < end:
            prompt, tokens = chance.choice(list(self._answers)), chance.randint(1, _LONGEST)
            expected = " ".join(self._answers[prompt][:tokens])
            self._asked += 1
            leaves = self._asked % _LEAVING_EVERY == 0
            found = ""
            stream = await client.completions.create(
                model="speaking", prompt=prompt, max_tokens=tokens, temperature=0, stream=True, timeout=60.0
            )
            async with contextlib.aclosing(stream):
                async for part in stream:
                    found += part.choices[0].text
                    if leaves and found:
                        break
            if leaves:
                self.totals.left += 1
            else:
                self.totals.answered += 1
            if not expected.startswith(found) if leaves else found != expected:
                self.totals.wrong.append(f"{prompt!r}: {found!r} in place of {expected!r}")
