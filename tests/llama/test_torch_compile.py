"""torch.compile of a model, or of its caller: the graph breaks at the model, and the results stay the same."""

from __future__ import annotations

import pytest
import torch

from llama_split import SplitLlamaForCausalLM
from tests.support.llamas import Small
from tests.support.prompts import SHARED, prompt, single_prompt


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """Forget what other tests have compiled."""
    torch._dynamo.reset()


def test_a_compiled_model_gives_the_unsplit_models_logits(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """Calls with several lengths, which would cause recompilation."""
    compiled = torch.compile(plain_split, backend="eager")
    with torch.inference_mode():
        for tokens in (8, 5, 11):
            expected = plain.unsplit(prompt(tokens)).logits
            torch.testing.assert_close(compiled(prompt(tokens)).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_model_that_compiles_itself_generates_the_same(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """``model.compile()``, then ``generate``."""
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, do_sample=False)
    plain_split.compile(backend="eager")
    assert torch.equal(plain_split.generate(**single_prompt(), **SHARED, do_sample=False), expected)


def test_a_compiled_function_that_calls_a_model_is_broken_there(plain_split: SplitLlamaForCausalLM) -> None:
    """The code before and after the model compiles to two graphs; a single graph is refused, with the reason."""

    def choose(ids: torch.Tensor) -> torch.Tensor:
        chosen: torch.Tensor = plain_split(ids + 1).logits.softmax(-1).argmax(-1) * 2
        return chosen

    expected = choose(prompt())
    assert torch.equal(torch.compile(choose, backend="eager")(prompt()), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="it asks another process"):
        torch.compile(choose, backend="eager", fullgraph=True)(prompt())


def test_a_compiled_function_may_ask_for_embeddings_and_logits(plain_split: SplitLlamaForCausalLM) -> None:
    """These two matrices may be on the worker."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        hidden = plain_split.get_input_embeddings()(ids) * 2
        found: torch.Tensor = plain_split.get_output_embeddings()(hidden) + 1
        return found

    expected = logits(prompt())
    assert torch.equal(torch.compile(logits, backend="eager")(prompt()), expected)
