"""Fixtures of all tests that run a model; a conftest imports them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llama_split import SplitLlamaForCausalLM
from tests.support.children import Mother
from tests.support.commands import environment
from tests.support.process import ROOT


@pytest.fixture(scope="session", autouse=True)
def by_doorbell() -> Iterator[None]:
    """A model reaches its worker by the quicker channel unless a test says otherwise; some run both."""
    defaults = SplitLlamaForCausalLM.from_pretrained.__func__.__kwdefaults__  # type: ignore[attr-defined]
    before = defaults["channel"]
    defaults["channel"] = "doorbell"
    yield
    defaults["channel"] = before


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are faster on one thread, and the two sides compute in turn on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama_mother() -> Iterator[Mother]:
    """What commands and workers are forked from, since importing torch and transformers takes seconds."""
    mother = Mother.beside_us() or Mother.start(ROOT / "tests/support/processes/warm.py", environment=environment())
    yield mother
    mother.end()
