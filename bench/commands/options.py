"""Options that several commands share, and how their values are parsed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from llama_split.commands.signature import takes

from ..contenders import Contender, choose
from ..harness.content import words

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmark-results.md")
IMAGES = ROOT / "docs" / "images"

ContendersOption = Annotated[str, typer.Option(help="Parts of contenders' names, comma-separated; empty for all.")]
SizesOption = Annotated[str, typer.Option(help="Bytes of a tensor, comma-separated: multiples of 8, and at least 64.")]
DtypesOption = Annotated[str, typer.Option(help="Dtypes, comma-separated.")]
SecondsOption = Annotated[float, typer.Option(min=0.0, help="Seconds to measure each contender and size in a round.")]
RoundsOption = Annotated[
    int, typer.Option(min=1, help="Rounds; contenders take turns, so that drift affects them all.")
]
PinOption = Annotated[bool, typer.Option("--pin", help="Pin client and server to a core each.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results into this file.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Write a plot into this directory.")]


command_of = functools.partial(takes, errors=contextlib.nullcontext)
"""Decorates the function of a dataclass of options so that it is a command; its errors keep their tracebacks."""


def contenders_of(names: str, moving_only: bool = False) -> list[type[Contender]]:
    """The contenders that ``--contenders`` selects.

    Raises:
        typer.BadParameter: A part of a name matches none.
    """
    try:
        return choose(names, moving_only)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def sizes_of(text: str) -> list[int]:
    """The sizes that ``--sizes`` lists.

    Raises:
        typer.BadParameter: One of them is no size.
    """
    sizes = integers_of(text)
    try:
        for size in sizes:
            words(size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return sizes


def integers_of(text: str) -> list[int]:
    """Comma-separated integers.

    Raises:
        typer.BadParameter: One of them is no integer.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a comma-separated list of integers") from error


def names_of(text: str, known: Iterable[str]) -> list[str]:
    """Comma-separated names out of the known ones.

    Raises:
        typer.BadParameter: One of them is unknown.
    """
    names, known = text.split(","), list(known)
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is unknown; choose from {', '.join(known)}")
    return names
