"""What clients ask for: OpenAI's requests, checked, and in this server's terms.

Fields that this server does not know are tolerated, as OpenAI's own servers do with theirs; those that would change an
answer and that it can't follow are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import InvalidRequest
from .forms import Form, Forms
from .sampling import Sampling

_MOST_CHOICES = 16
_MOST_STOPS = 4

Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Count = Annotated[int, Field(ge=1)]


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: bool = False


class CommonRequest(BaseModel):
    """What requests for chats and for plain text have in common."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def stops(self) -> list[str]:
        """The strings that end an answer.

        Raises:
            InvalidRequest: they are too many, or one is empty.
        """
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > _MOST_STOPS or "" in given:
            raise InvalidRequest(f"stop must be up to {_MOST_STOPS} strings, none of them empty", "stop")
        return given

    def sampling(self, top_logprobs: int | None, form: Form | None, vocabulary: int) -> Sampling:
        """How tokens are to be chosen.

        Args:
            top_logprobs: how many alternatives to record for each token; None: record nothing.
            form: the form that the answer must have; None: any.
            vocabulary: how many tokens the model knows.

        Raises:
            InvalidRequest: a bias is for a token that the model does not know.
        """
        bias = self.logit_bias or {}
        if unknown := [token for token in bias if not 0 <= token < vocabulary]:
            raise InvalidRequest(f"logit_bias names token {unknown[0]}; the model has {vocabulary}", "logit_bias")
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=bias,
            top_logprobs=top_logprobs,
            form=form,
        )


class ContentPart(BaseModel):
    """A part of a message; this server reads text only."""

    type: str
    text: str = ""


class ChatMessage(BaseModel):
    """One message of a chat. Fields that a model's template may use, such as tool calls, are kept."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[ContentPart] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it.

        Raises:
            InvalidRequest: a part of it is no text.
        """
        message = self.model_dump(exclude_unset=True)
        if isinstance(self.content, list):
            if other := [part.type for part in self.content if part.type != "text"]:
                raise InvalidRequest(f"a message has a part of type {other[0]!r}; this model reads text", "messages")
            message["content"] = "".join(part.text for part in self.content)
        elif self.content is None:
            message["content"] = ""
        return message


class JsonSchema(BaseModel):
    """A JSON schema, and what it is called."""

    model_config = ConfigDict(populate_by_name=True)

    content: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(BaseModel):
    """The form that an answer must have."""

    type: str
    json_schema: JsonSchema | None = None


class ChatRequest(CommonRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None

    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def recorded(self) -> int | None:
        """How many alternatives to record for each token; None: nothing is recorded.

        Raises:
            InvalidRequest: alternatives are asked for without probabilities.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def form(self, forms: Forms) -> Form | None:
        """The form that the answer must have; None for plain text. Raises as ``Forms.of``."""
        asked = self.response_format
        if asked is None:
            return None
        return forms.of(asked.type, None if asked.json_schema is None else asked.json_schema.content)


class CompletionRequest(CommonRequest):
    """``POST /v1/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """All prompts, each as text or as tokens.

        Raises:
            InvalidRequest: there is none, or other answers than ``n`` are to be made.
        """
        if self.best_of not in (None, self.n):
            raise InvalidRequest(
                f"best_of={self.best_of} is not supported here; leave it out, or let it be n", "best_of"
            )
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [one for one in self.prompt if isinstance(one, int)]
        if tokens:
            return [tokens]
        if not self.prompt:
            raise InvalidRequest("prompt is empty", "prompt")
        return [one for one in self.prompt if not isinstance(one, int)]


Request = TypeVar("Request", bound=CommonRequest)


def parsed(kind: type[Request], body: bytes) -> Request:
    """A request's body.

    Raises:
        InvalidRequest: it is not what this kind of request is; the error names the first field that is wrong.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(
            f"{where or 'the body'}: {first['msg']}", str(first["loc"][0]) if where else None
        ) from None
