"""``llama-split serve`` as a process: it starts a worker, answers, and finishes what it has begun before it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import openai

from tests.support.commands import environment
from tests.support.helpers import eventually

from .conftest import Speaking


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def test_it_serves_and_ends_in_order(speaking: Speaking) -> None:
    """SIGTERM in the middle of an answer: that answer is finished, the worker ended, and the exit code is 0."""
    port = _free_port()
    command = [
        "-m",
        "llama_split",
        "serve",
        "--model",
        str(speaking.path),
        "--port",
        str(port),
        "--channel",
        "doorbell",
    ]
    process = subprocess.Popen(
        [sys.executable, *command], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
    try:
        assert eventually(lambda: _is_up(client, process), within_s=60.0)
        name = speaking.path.name
        answers: list[Any] = []

        def ask() -> None:
            options: dict[str, Any] = {"model": name, "prompt": "w5 w6", "max_tokens": 60, "temperature": 0}
            parts = client.completions.create(**options, stream=True)
            answers.extend(part.choices[0].text for part in parts)

        asking = threading.Thread(target=ask)
        asking.start()
        assert eventually(lambda: bool(answers))
        process.send_signal(signal.SIGTERM)
        asking.join(30.0)
        assert "".join(answers) == speaking.answer("w5 w6", 60)
        said, _ = process.communicate(timeout=30.0)
        assert process.returncode == 0, said
        assert f"serving {name} at http://127.0.0.1:{port}/v1" in said
    finally:
        client.close()
        process.kill()
        process.communicate()


def _is_up(client: openai.OpenAI, process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None, process.communicate()[0]
    try:
        return bool(client.models.list().data)
    except openai.APIConnectionError:
        return False
