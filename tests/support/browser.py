"""A headless Chromium, driven by a few commands of the WebDriver protocol (https://www.w3.org/TR/webdriver2/)."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.helpers import eventually

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to one


class Browser:
    """One window; elements are named by their id."""

    def __init__(self, port: int, data: Path) -> None:
        self._port = port
        options = {"binary": CHROMIUM, "args": [*_ARGUMENTS, f"--user-data-dir={data}"]}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options}}
        self._session = f"/session/{self._ask('POST', '/session', capabilities=capabilities)['sessionId']}"

    def open(self, url: str) -> None:
        self._ask("POST", f"{self._session}/url", url=url)

    def text(self, name: str) -> str:
        return str(self._ask("GET", f"{self._element(name)}/text"))

    def is_enabled(self, name: str) -> bool:
        return bool(self._ask("GET", f"{self._element(name)}/enabled"))

    def click(self, name: str) -> None:
        self._ask("POST", f"{self._element(name)}/click")

    def write(self, name: str, text: str) -> None:
        """Type a text in place of what is there."""
        self._ask("POST", f"{self._element(name)}/clear")
        self._ask("POST", f"{self._element(name)}/value", text=text)

    def close(self) -> None:
        self._ask("DELETE", self._session)

    def _element(self, name: str) -> str:
        found = self._ask("POST", f"{self._session}/element", using="css selector", value=f"#{name}")
        return f"{self._session}/element/{found[_ELEMENT]}"

    def _ask(self, method: str, path: str, **body: Any) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request(method, path, json.dumps(body) if method == "POST" else None)
            answer = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer


@contextlib.contextmanager
def browsing(data: Path) -> Iterator[Browser]:
    """A browser for the length of the block, which keeps what it keeps in a directory."""
    assert DRIVER is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"],
        env={**os.environ, "TMPDIR": str(data)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def is_up() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return True
        return False

    try:
        assert eventually(is_up)
        browser = Browser(port, data)
        yield browser
        browser.close()
    finally:
        driver.terminate()
        driver.wait()
