"""The registered handlers of a server, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import LocalProtocolError
from ..text import printable
from .built_in import BuiltIn, built_in


class Handlers:
    """Maps the names of methods to handlers; the built-in methods belong to every server."""

    def __init__(self) -> None:
        self.by_name: dict[str, Callable[..., Any]] = {}

    def add(self, name: str, handler: Callable[..., Any]) -> None:
        """Add a handler.

        Raises:
            LocalProtocolError: The name is taken, reserved or not a str, or the handler can't be called.
        """
        if not isinstance(name, str) or not callable(handler):
            raise LocalProtocolError("register takes the name of a method, a str, and a function")
        if name.startswith("__"):
            raise LocalProtocolError(f"{name!r} can't be registered: names that start with '__' are the server's own")
        if name in self.by_name:
            raise LocalProtocolError(f"a handler for {name!r} is already registered")
        self.by_name[name] = handler

    def names(self) -> list[str]:
        """Return the names of all handlers, sorted."""
        return sorted(self.by_name)

    def find(self, name: str, server: BuiltIn) -> Callable[..., Any]:
        """Return the handler of this name.

        Raises:
            LocalProtocolError: There is none; the error lists those that there are.
        """
        handler = self.by_name[name] if name in self.by_name else built_in(name, server)
        if handler is None:
            known = ", ".join(self.names()) or "none"
            raise LocalProtocolError(f"there is no method '{printable(name)}'; there are: {known}")
        return handler
