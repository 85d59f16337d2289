"""The page at /: what a user types is answered there, part by part, with what it costs and what the worker sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_split.boundary.operations import REVEALED, Mode
from llama_split.boundary.traffic import calls_per_forward
from tests.support.browser import CHROMIUM, DRIVER, browsing
from tests.support.helpers import eventually

from .conftest import KEY, Served

needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium, or no chromedriver")


def test_the_page_is_there_without_a_key_and_its_facts_are_not(served: Served) -> None:
    """It asks for the key itself, and refers to nothing on other hosts."""
    status, page = served.ask("GET", "/")
    assert status == 200
    assert b"<title>llama-split</title>" in page
    assert b"//" not in page.replace(b"://", b"").replace(b"<!doctype", b"")
    assert served.ask("GET", "/about")[0] == 401
    status, facts = served.ask("GET", "/about", Authorization=f"Bearer {KEY}")
    assert status == 200
    told = json.loads(facts)
    assert (told["model"], told["mode"], told["revealed"]) == ("speaking", "fused", REVEALED[Mode.FUSED])
    assert told["transport"].keys() == {"calls", "call_seconds"}


@needs_browser
def test_a_prompt_is_answered_in_a_browser(served: Served, directory: Path) -> None:
    """The answer's words, the mode, what the worker sees, and the calls of a token; a missing key is told."""
    with browsing(directory) as browser:
        browser.open(served.url)
        assert eventually(lambda: "key" in browser.text("answer"))
        browser.write("key", KEY)
        browser.write("prompt", "w5 w6")
        browser.click("send")
        assert eventually(lambda: len(browser.text("answer").split()) > 3)
        browser.click("stop")
        assert eventually(lambda: browser.is_enabled("send"))
        assert all(word.startswith("w") for word in browser.text("answer").split())
        found = [browser.text(name) for name in ("model", "mode", "revealed")]
        assert found == ["speaking", "fused", REVEALED[Mode.FUSED]]
        assert eventually(lambda: served.service.engine.running == 0), "the generation went on after Stop"


@needs_browser
def test_the_cost_of_a_token_is_shown(served: Served, directory: Path) -> None:
    """After an answer: how many tokens it has, and what one costs in calls; here by the page's own sums."""
    with browsing(directory) as browser:
        browser.open(served.url)
        browser.write("key", KEY)
        browser.write("prompt", "w5 " * 1000)  # leaves room for few tokens
        browser.click("send")
        assert eventually(lambda: browser.text("tokens").isdigit(), within_s=60.0)
        per_forward = calls_per_forward(Mode.FUSED, served.service.model.workers.geometry)
        assert float(browser.text("calls")) >= per_forward
        assert browser.text("time").endswith(" µs")
