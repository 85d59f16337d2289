"""The page on serving is true: its Python runs against a server, and its table names all paths."""

from __future__ import annotations

import re
import subprocess
import sys

from fastapi.routing import APIRoute

from llama_split.serving.app import create_app
from tests.support.documents import DOCS, python_of
from tests.support.process import Process

from .conftest import KEY, Served, Speaking

PAGE = DOCS / "guide/serving.md"


def test_the_pages_python_prints_an_answer(served: Served, speaking: Speaking) -> None:
    """As it stands, but for the address, the key, the model's name and what is asked; greedily, to be compared."""
    code = python_of(PAGE.read_text())
    for given, ours in (
        ("http://127.0.0.1:8000", served.url),
        ('"unused"', repr(KEY)),
        ('"llama"', '"speaking"'),
        ("What is the capital of France?", "w5 w6"),
        ("stream=True", "stream=True, max_tokens=8, temperature=0"),
    ):
        assert given in code
        code = code.replace(given, ours)
    done = subprocess.run(
        [sys.executable, "-c", code], env=Process.environment(), capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == speaking.answer("w5 w6 w1", 8)


def test_the_page_lists_all_paths(served: Served) -> None:
    """And no other."""
    listed = {tuple(found) for found in re.findall(r"^\| `(GET|POST) (\S+)` \|", PAGE.read_text(), re.MULTILINE)}
    app = create_app(served.service)
    routes = [route for route in app.routes if isinstance(route, APIRoute) and "{" not in route.path]
    assert listed == {(method, route.path) for route in routes for method in route.methods}
