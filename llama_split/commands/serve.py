"""``llama-split serve``: the model over HTTP, for clients that speak OpenAI's protocol."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType
from typing import Annotated

import typer

from ..boundary.choices import KEY_VARIABLE, LEAST_KV_TOKENS
from ..errors import LlamaSplitError
from .console import notice
from .on_ray import RayOptions, check_unused, serve_on_ray
from .opening import Opening
from .options import AdvancedOptions, SplitOptions, VerboseOption, model_name
from .settings import Settings
from .signature import takes


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of ``llama-split serve``, in the order of its help."""

    split: SplitOptions
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any that is free.")] = 8000
    api_key: Annotated[
        str | None, typer.Option(help=f"Key that clients must send. Default: ${KEY_VARIABLE}; without either, none.")
    ] = None
    served_name: Annotated[str | None, typer.Option(help="What clients call the model. Default: its file's name.")] = (
        None
    )
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Requests that may wait for their first token; further ones get status 429.")
    ] = 128
    max_kv_tokens: Annotated[
        int | None,
        typer.Option(
            min=LEAST_KV_TOKENS,
            help="Tokens that the KV cache has room for, over all requests. Default: 8 texts of full length, or what "
            "an eighth of the memory holds.",
        ),
    ] = None
    drain_s: Annotated[
        float, typer.Option(min=0.0, help="Seconds that running requests have to finish after SIGTERM or Ctrl-C.")
    ] = 30.0
    cluster: RayOptions
    advanced: AdvancedOptions
    verbose: VerboseOption = False


@takes(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Serve the model over HTTP, by OpenAI's protocol.

    Many requests are answered at once. SIGTERM or Ctrl-C ends it: no new requests are taken, and running ones finish.
    """
    with contextlib.ExitStack() as stack:
        api_key = options.api_key or os.environ.get(KEY_VARIABLE) or None
        _warn_if_open(options.host, api_key)
        check_unused(options.cluster)
        if options.cluster.ray:
            serving = {
                "api_key": api_key,
                "served_name": options.served_name,
                "max_waiting": options.max_waiting,
                "max_kv_tokens": options.max_kv_tokens,
                "drain_s": options.drain_s,
            }
            serve_on_ray(options.cluster, options.split, options.advanced, serving, options.host, options.port)
            return
        opening = Opening(options.split, options.advanced, stack, verbose=options.verbose)
        tokenizer = opening.tokenizer
        try:
            import uvicorn

            from ..serving.app import create_app
            from ..serving.engine import Limits, default_kv_tokens
            from ..serving.service import Service
        except ModuleNotFoundError as error:
            raise LlamaSplitError(f"llama-split serve needs {error.name}: pip install 'shmtransport[serve]'") from None
        llama = opening.connect()
        kv_tokens = options.max_kv_tokens or default_kv_tokens(llama)
        name = options.served_name or _name_of(options.split.model)
        service = Service(llama, tokenizer, name, Limits(kv_tokens, options.max_waiting))
        stack.callback(service.close)
        config = uvicorn.Config(
            create_app(service, api_key),
            host=options.host,
            port=options.port,
            log_level="info" if options.verbose else "warning",
            timeout_graceful_shutdown=max(1, round(options.drain_s)),
        )
        notice(f"serving {name} at http://{options.host}:{options.port}/v1")
        with _signals_end_it_once():
            uvicorn.Server(config).run()


@contextlib.contextmanager
def _signals_end_it_once() -> Iterator[None]:
    """Uvicorn ends in order on SIGINT and SIGTERM, and raises them again after that: then they have been heeded."""
    before = {number: signal.signal(number, _heeded) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heeded(_number: int, _frame: FrameType | None) -> None:
    """Do nothing."""


def _name_of(model: str | None) -> str:
    return PurePath(model_name(Settings(report=lambda _line: None), model)).stem


def _warn_if_open(host: str, api_key: str | None) -> None:
    """Tell if other machines can use the server without a key."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if api_key is None and host != "localhost":
        notice(f"anyone who can reach {host} can use this server: pass --api-key")
