"""Every split serves: the same answers, and nothing left at the worker, wherever the KV is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llama_split import SplitLlamaForCausalLM
from llama_split.boundary.operations import Mode
from tests.support.helpers import eventually
from tests.support.llamas import worker_in_thread

from .conftest import Served, Speaking, serving

PROMPTS = ["w5 w6", "w7", "w1 w2 w3 " * 60, "w9 w8 w7 w6"]


@pytest.mark.parametrize("mode", [mode.value for mode in Mode])
def test_answers_are_the_unsplit_models_and_leave_nothing(speaking: Speaking, mode: str) -> None:
    """Several prompts at once, one longer than a step, one client that leaves; then no session is left."""
    with (
        worker_in_thread(speaking.path) as worker,
        SplitLlamaForCausalLM.from_pretrained(speaking.path, worker=worker.address, mode=mode) as split,
        serving(speaking.service(split)) as served,
    ):
        leaving = served.client().completions.create(model="speaking", prompt="w4", max_tokens=1000, stream=True)
        next(iter(leaving))
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(lambda prompt: _ask(served, prompt), PROMPTS))
        assert answers == [speaking.answer(prompt, 12) for prompt in PROMPTS]
        if split.mode.worker_keeps_kv:
            assert len(worker.service.sessions) == 1, "that of the one that streams"
        leaving.close()
        assert worker.sessions_become(0)
        assert eventually(lambda: (served.service.engine.running, served.service.engine.waiting) == (0, 0))


def _ask(served: Served, prompt: str) -> str:
    options: dict[str, Any] = {"model": "speaking", "prompt": prompt, "temperature": 0, "max_tokens": 12}
    text: str = served.client().completions.create(**options).choices[0].text
    return text
