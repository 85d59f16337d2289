"""Makes a typer command from a function that takes one dataclass of options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter, Signature
from typing import Any, TypeVar, get_type_hints

from .console import one_line_errors

Options = TypeVar("Options")


def takes(
    options: type[Options], errors: Callable[[], AbstractContextManager[None]] = one_line_errors
) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Decorate a function of one ``options`` object so that typer finds a parameter for each of its fields.

    A field's annotation carries its help, as on a parameter. A field that is a dataclass itself stands for the fields
    of that one.

    Args:
        options: the dataclass.
        errors: what the command runs in, the making of its options included. By default, what a user can fix ends it
            with one line.
    """

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**values: Any) -> None:
            with errors():
                function(_build(options, values))

        parameters = list(_parameters(options))
        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _parameters(options: type) -> Iterator[Parameter]:
    for name, (annotation, default) in _fields(options).items():
        if is_dataclass(annotation):
            yield from _parameters(annotation)  # type: ignore[arg-type]
        else:
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _build(options: type[Options], values: dict[str, Any]) -> Options:
    """Make the dataclass, and those that it is composed of, from the values of all fields."""
    own: dict[str, Any] = {}
    for name, (annotation, _) in _fields(options).items():
        nested: Any = annotation if is_dataclass(annotation) else None
        own[name] = values[name] if nested is None else _build(nested, values)
    return options(**own)


def _fields(options: type) -> dict[str, tuple[Any, Any]]:
    """Each field's resolved annotation and its default."""
    hints = get_type_hints(options, include_extras=True)
    found: tuple[Any, ...] = fields(options)
    return {
        field.name: (hints[field.name], Parameter.empty if field.default is MISSING else field.default)
        for field in found
    }
