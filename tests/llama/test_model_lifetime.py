"""A model that is dropped ends its connection at once."""

from __future__ import annotations

import gc
import os
import warnings
import weakref
from collections.abc import Iterator

import pytest

from llama_split import SplitLlamaForCausalLM, WorkerMismatch
from tests.support.llamas import Small, Worker
from tests.support.prompts import SHARED, single_prompt


@pytest.fixture
def without_collections() -> Iterator[None]:
    """Turn off garbage collection: an object dies only when its last reference goes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_closed_model_is_in_no_cycle(
    plain: Small, plain_worker: Worker, mode: str, without_collections: None
) -> None:
    """It dies with its last reference, and its connection with it; used or not."""
    model = SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode=mode)
    model.generate(**single_prompt(), **SHARED)
    model.close()
    dying = [weakref.ref(model), weakref.ref(model.workers), weakref.ref(model.model)]
    del model
    assert [each() for each in dying] == [None, None, None]


def test_a_dropped_model_ends_its_connection_and_warns(
    plain: Small, plain_worker: Worker, mode: str, without_collections: None
) -> None:
    """As when a notebook's cell replaces its model; the worker frees what it kept."""
    model = SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode=mode)
    model.generate(**single_prompt(), **SHARED)
    link = model.workers
    with pytest.warns(ResourceWarning, match=f"worker at {plain_worker.address} was dropped: close"):
        del model
    assert link.closed
    assert plain_worker.sessions_become(0)


def test_a_model_that_was_not_made_warns_of_nothing(plain: Small, plain_worker: Worker) -> None:
    """Its connection was closed when making it failed."""
    with warnings.catch_warnings(record=True) as caught, pytest.raises(WorkerMismatch):
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, dtype="bfloat16")
    gc.collect()
    assert caught == []


def test_a_forked_child_drops_its_parents_model_in_silence(plain: Small, plain_worker: Worker) -> None:
    """The child has no connection to end; the parent's goes on."""
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address) as model:
        expected = model.generate(**single_prompt(), **SHARED, do_sample=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about a fork while threads run
            child = os.fork()
        if child == 0:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.__del__()
            os._exit(len(caught))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert model.generate(**single_prompt(), **SHARED, do_sample=False).equal(expected)


def test_a_model_in_a_callers_cycle_is_collected(plain: Small, plain_worker: Worker, mode: str) -> None:
    """Whatever is in the cycle: the collection does not wait, the connection ends, and a warning reports it."""
    model = SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode=mode)
    model.generate(**single_prompt(), **SHARED)
    model.callers_own = [model.generate]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del model
        gc.collect()
    assert any("dropped" in str(one.message) for one in caught if one.category is ResourceWarning)
    assert plain_worker.sessions_become(0)
