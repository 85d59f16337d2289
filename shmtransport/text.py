"""Makes text that this process did not write, such as a peer's or a file's, safe to show.

Such text may hold escape sequences that drive a terminal, line breaks that forge lines of a log, and characters that
are invisible or reorder their neighbours. All of it goes through here before it is shown, logged or put into an
exception.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import traceback
from collections.abc import Iterator

_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Characters that show nothing: Unicode calls them ignorable by default, Python calls them printable."""


def printable(text: str, keep: str = "") -> str:
    r"""Make a foreign text one line in which every character can be seen.

    Line breaks, tabs and other white space become spaces. Control, format and bidirectional characters, lone
    surrogates and all others that can't be seen are escaped as in Python, for example ``\x1b``.

    Args:
        text: what a peer or a file says.
        keep: characters that stay as they are, such as ``"\n\t"`` for text that may have several lines.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if one in keep else _visible(one) for one in text)


def _visible(one: str) -> str:
    if one.isspace():
        return " "
    if one.isprintable() and not _INVISIBLE.match(one):
        return one
    return ascii(one)[1:-1]


def traceback_text(error: BaseException) -> str:
    """An exception with its causes and their tracebacks, as Python prints it, but with each text on one line."""
    return "".join(_told(error)).rstrip("\n")


def _told(error: BaseException) -> Iterator[str]:
    for one in reversed(list(_chain(error))):
        if one.__traceback__ is not None:
            yield "Traceback (most recent call last):\n"
            yield from traceback.format_tb(one.__traceback__)
        yield f"{type(one).__qualname__}: {printable(_str(one))}\n"
        for note in getattr(one, "__notes__", ()):
            yield f"{printable(_str(note))}\n"


def _str(thing: object) -> str:
    try:
        return str(thing)
    except Exception:  # noqa: BLE001 - a handler's exception may fail at anything
        return "its text can't be shown"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, those that it was raised from or while handling, and those that it is a group of; each once."""
    left, seen = [error], set()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        members = getattr(one, "exceptions", ())
        context = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        group = [member for member in members if isinstance(member, BaseException)] if type(members) is tuple else []
        left += [*group, *([] if context is None else [context])]


_MAY_WAIT = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def forget_frames(error: BaseException) -> None:
    """Clear the frames that an exception was raised in: they hold borrowed tensors for as long as it is kept.

    Not those of generators and coroutines: such a frame may be waiting to continue, and clearing would end it.
    """
    for one in _chain(error):
        for frame, _ in traceback.walk_tb(one.__traceback__):
            if not frame.f_code.co_flags & _MAY_WAIT:
                with contextlib.suppress(RuntimeError):  # it is running
                    frame.clear()
