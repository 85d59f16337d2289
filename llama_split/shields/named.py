"""Finds shields by name: our own, and those that other packages register as entry points."""

from __future__ import annotations

from importlib.metadata import entry_points

from ..boundary.choices import NO_SHIELD
from ..boundary.operations import Mode
from ..errors import LlamaSplitError
from .base import Shield
from .otp import OtpShield
from .verify import VerifyShield

GROUP = "llama_split.shields"
_OWN: dict[str, type[Shield]] = {VerifyShield.name: VerifyShield, OtpShield.name: OtpShield}


def names() -> list[str]:
    """The names that can be chosen."""
    return [NO_SHIELD, *sorted({*_OWN, *entry_points(group=GROUP).names})]


def shield_named(given: str | Shield | None, mode: Mode) -> Shield | None:
    """Make the shield of this name; one that is made already, and none, are returned as they are.

    Raises:
        LlamaSplitError: there is none of this name, or it does not work with this mode.
    """
    shield = _made(given) if isinstance(given, str) else given
    if shield is not None and mode not in shield.modes:
        possible = " or ".join(one.value for one in shield.modes)
        raise LlamaSplitError(
            f"the shield {shield.name} can't be used in mode {mode.value}, where the worker attends, which is not "
            f"linear: use {possible}"
        )
    return shield


def _made(name: str) -> Shield | None:
    if name == NO_SHIELD:
        return None
    if name in _OWN:
        return _OWN[name]()
    found = [one for one in entry_points(group=GROUP) if one.name == name]
    if not found:
        raise LlamaSplitError(f"there is no shield {name!r}; there are: {', '.join(names())}")
    made = found[0].load()()
    if not isinstance(made, Shield):
        raise LlamaSplitError(
            f"the entry point {name!r} makes an object of type {type(made).__name__}, which is no shield"
        )
    return made
