"""Answers that are held to a form: always JSON of that schema, whatever the model would rather say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama_split import SplitLlamaForCausalLM
from llama_split.serving.engine import Limits
from llama_split.serving.errors import InvalidRequest
from llama_split.serving.forms import Forms
from llama_split.serving.sampling import Choice, Sampling
from llama_split.serving.service import Service
from tests.support.llamas import random_llama, worker_in_thread

from .conftest import Served, serving

END = 256
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "color": {"enum": ["red", "green"]}},
    "required": ["ok", "color"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and one that ends an answer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<end>")  # noqa: S106
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert made.eos_token_id == END
    return made


@pytest.fixture(scope="module")
def served_bytes(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("bytes")
    tokenizer.save_pretrained(path)
    random_llama(seed=4, vocab_size=END + 1, eos_token_id=END).save_pretrained(path)
    with (
        worker_in_thread(path) as worker,
        SplitLlamaForCausalLM.from_pretrained(path, worker=worker.address) as split,
        serving(Service(split, tokenizer, "bytes", Limits(2048, 64))) as served,
    ):
        yield served


@pytest.mark.parametrize("seed", range(5))
def test_a_choice_is_held_to_a_schema(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Over random scores: each token leaves the answer a beginning of such JSON, and it ends when that is whole."""
    form = Forms(tokenizer, END + 1, [END]).of("json_schema", SCHEMA)
    choice = Choice(Sampling(seed=seed, form=form))
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while not tokens or tokens[-1] != END:
        tokens.append(choice.choose(torch.randn(END + 1, generator=generator)))
        assert len(tokens) < 200
    found = json.loads(tokenizer.decode(tokens[:-1]))
    assert found.keys() == SCHEMA["properties"].keys()
    assert type(found["ok"]) is bool
    assert found["color"] in ("red", "green")


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"enum": []}, {"$ref": "#/nowhere"}])
def test_a_schema_that_is_none_is_refused(tokenizer: PreTrainedTokenizerFast, schema: dict[str, Any]) -> None:
    """In one line, as the fault of that field."""
    with pytest.raises(InvalidRequest) as caught:
        Forms(tokenizer, END + 1, [END]).of("json_schema", schema)
    assert caught.value.param == "response_format"
    assert "\n" not in str(caught.value)


def test_the_server_holds_answers_to_a_schema(served_bytes: Served) -> None:
    """Several answers to one request, each JSON of that schema and ended by itself; others beside them are free."""
    client = served_bytes.client()
    messages: Any = [{"role": "user", "content": "What color?"}]
    form: Any = {"type": "json_schema", "json_schema": {"name": "color", "schema": SCHEMA}}
    reply = client.chat.completions.create(
        model="bytes", messages=messages, response_format=form, n=3, max_tokens=100, temperature=1.5, seed=1
    )
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        found = json.loads(choice.message.content or "")
        assert found.keys() == SCHEMA["properties"].keys()
    free = client.chat.completions.create(model="bytes", messages=messages, max_tokens=20, temperature=0)
    assert not (free.choices[0].message.content or "").startswith("{")
