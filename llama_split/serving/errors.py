"""What this server refuses, and how that looks to OpenAI's clients."""

from __future__ import annotations

from typing import Any

from ..errors import LlamaSplitError


class RequestRefused(LlamaSplitError):
    """A request that is not answered.

    Args:
        text: what is wrong, and what to do.
        param: the field that it is about.
    """

    status = 400
    kind = "invalid_request_error"
    code: str | None = None

    def __init__(self, text: str, param: str | None = None) -> None:
        super().__init__(text, param)
        self.param = param

    def __str__(self) -> str:
        return str(self.args[0])

    def body(self) -> dict[str, Any]:
        """As JSON, in OpenAI's form."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class InvalidRequest(RequestRefused):
    """It can't be answered as it stands."""


class TooLong(RequestRefused):
    """Prompt and answer have no room."""

    code = "context_length_exceeded"


class Unauthorized(RequestRefused):
    """It comes without the server's key."""

    status = 401
    code = "invalid_api_key"


class NotFound(RequestRefused):
    """It is for a model or a path that is not here."""

    status = 404
    code = "model_not_found"


class BodyTooLarge(RequestRefused):
    """Its body is larger than any request needs."""

    status = 413


class Busy(RequestRefused):
    """Too many others wait."""

    status = 429
    kind = "rate_limit_error"
    code = "too_many_requests"


class Unavailable(RequestRefused):
    """The model can't answer now."""

    status = 503
    kind = "server_error"
    code = "model_unavailable"


class Failed(RequestRefused):
    """A fault of this server's."""

    status = 500
    kind = "server_error"
