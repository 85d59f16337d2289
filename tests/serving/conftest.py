"""Fixtures of the server's tests: a small model that speaks in words, served in this process."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llama_split import SplitLlamaForCausalLM
from llama_split.serving.app import create_app
from llama_split.serving.engine import Limits
from llama_split.serving.service import Service
from tests.support.children import Mother
from tests.support.llamas import Worker, random_llama, worker_in_thread
from tests.support.model_fixtures import by_doorbell, llama_mother, one_thread
from tests.support.workers import Workers

__all__ = ["by_doorbell", "llama_mother", "one_thread"]

VOCABULARY = 160
KEY = "open sesame"
_TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}{% if tools %}w9 {% endif %}w1"
_STARTED_S = 30.0


@dataclass(frozen=True)
class Speaking:
    """A small model on disk that speaks in the words "w0" to "w159", and the same one unsplit."""

    path: Path
    unsplit: LlamaForCausalLM
    tokenizer: Any

    def answer(self, prompt: str, tokens: int) -> str:
        """What the unsplit model answers, greedily, to a prompt alone."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        whole = self.unsplit.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        text: str = self.tokenizer.decode(whole[0, ids.shape[1] :])
        return text

    def service(self, split: SplitLlamaForCausalLM, kv_tokens: int = 2048, waiting: int = 64) -> Service:
        """What serves it, split."""
        return Service(split, self.tokenizer, "speaking", Limits(kv_tokens, waiting))


@dataclass(frozen=True)
class Served:
    """A running server: its address, its service, and OpenAI's clients of it."""

    url: str
    service: Service
    clients: contextlib.ExitStack

    def client(self, **options: Any) -> openai.OpenAI:
        """A client that is closed with the server."""
        made = openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": KEY, "max_retries": 0, **options})
        return self.clients.enter_context(made)

    def connection(self) -> http.client.HTTPConnection:
        """A connection for a request that OpenAI's clients don't make."""
        return http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)

    def ask(self, method: str, path: str, body: str | bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Make such a request; the status and body of its response."""
        with contextlib.closing(self.connection()) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="session")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Speaking:
    path = tmp_path_factory.mktemp("speaking")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")  # noqa: S106
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(path)
    model = random_llama(seed=3)
    model.save_pretrained(path)
    return Speaking(path, model, tokenizer)


@contextlib.contextmanager
def serving(service: Service, api_key: str | None = KEY) -> Iterator[Served]:
    """Serve for the length of the block."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(create_app(service, api_key), log_level="error", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        with contextlib.ExitStack() as clients:
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", service, clients)
    finally:
        server.should_exit = True
        thread.join(_STARTED_S)
        listening.close()
        service.close()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def served_worker(speaking: Speaking) -> Iterator[Worker]:
    with worker_in_thread(speaking.path) as running:
        yield running


@pytest.fixture(scope="module")
def workers(llama_mother: Mother, speaking: Speaking, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Workers of the small model, none of them started."""
    running = Workers(llama_mother, speaking.path, f"ipc://{tmp_path_factory.mktemp('workers')}/w.ipc")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def serve_with(speaking: Speaking, served_worker: Worker) -> Iterator[Callable[..., Served]]:
    """Serve the small model: ``serve_with(kv_tokens=…, waiting=…)``."""
    with contextlib.ExitStack() as stack:

        def start(kv_tokens: int = 2048, waiting: int = 64) -> Served:
            split = stack.enter_context(
                SplitLlamaForCausalLM.from_pretrained(speaking.path, worker=served_worker.address)
            )
            return stack.enter_context(serving(speaking.service(split, kv_tokens, waiting)))

        yield start


@pytest.fixture(scope="module")
def served(serve_with: Callable[..., Served]) -> Served:
    return serve_with()
