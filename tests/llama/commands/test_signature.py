"""Commands from dataclasses: the parameters that typer finds, and the object that the command receives."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Annotated, Any

import pytest
import typer

from llama_split.commands.chat import chat
from llama_split.commands.generate import generate
from llama_split.commands.options import AdvancedOptions, Sampling, SplitOptions
from llama_split.commands.signature import takes
from llama_split.errors import EXIT_ERROR, LlamaSplitError

NumberOption = Annotated[int, typer.Option(help="A number.")]


@dataclass(frozen=True)
class Inner:
    """Options that refuse a negative number."""

    number: NumberOption = 1

    def __post_init__(self) -> None:
        if self.number < 0:
            raise LlamaSplitError("--number is negative")


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Options composed of others."""

    name: Annotated[str, typer.Option()]
    inner: Inner
    loud: bool = False


got: list[Outer] = []


@takes(Outer)
def command(options: Outer) -> None:
    """Keep the options."""
    got.append(options)


def test_fields_become_parameters_in_their_order() -> None:
    """Those of a nested dataclass take its place, with their annotations and defaults."""
    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["name", "number", "loud"]
    assert parameters["number"].annotation == NumberOption
    assert [parameter.default for parameter in parameters.values()] == [inspect.Parameter.empty, 1, False]
    assert (command.__name__, command.__doc__) == ("command", "Keep the options.")


def test_the_command_gets_the_object() -> None:
    """Nested dataclasses are made from their own fields."""
    command(name="a", number=3, loud=True)
    assert got.pop() == Outer(name="a", inner=Inner(3), loud=True)


def test_an_option_that_is_refused_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with the error's text and exit code 2."""
    with pytest.raises(typer.Exit) as ended:
        command(name="a", number=-1, loud=False)
    assert ended.value.exit_code == EXIT_ERROR
    assert capsys.readouterr().err.strip() == "error: --number is negative"
    assert not got


@pytest.mark.parametrize("shared", [SplitOptions, Sampling, AdvancedOptions])
def test_generate_and_chat_share_their_options(shared: Any) -> None:
    """Each option of the shared dataclasses is a parameter of both commands, with the same default."""
    for each in (generate, chat):
        parameters = inspect.signature(each).parameters
        assert {one.name: one.default for one in fields(shared)} == {
            one.name: parameters[one.name].default for one in fields(shared)
        }
