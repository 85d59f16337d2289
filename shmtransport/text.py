"""Makes text that this process did not write safe to show: a peer's words, or those of a file.

Such text may hold escape sequences that drive a terminal, line breaks that forge lines of a log, and characters that
are invisible or reorder their neighbours. Whatever is shown, logged or put into an exception goes through here.
"""

from __future__ import annotations

import re

_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""What Unicode calls ignorable by default and Python calls printable: it shows nothing."""


def printable(text: str, keep: str = "") -> str:
    r"""Make a foreign text one line that shows all that is in it.

    Line breaks, tabs and other white space become spaces. Control, format and bidirectional characters, lone
    surrogates and all else that can't be seen are escaped as in Python, ``\x1b``.

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
