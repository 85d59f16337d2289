"""Sizes as people read them."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20


def size_text(nbytes: int) -> str:
    """A number of bytes in the largest unit of which it has at least one."""
    if nbytes >= MIB:
        return f"{nbytes / MIB:.1f} MiB"
    if nbytes >= KIB:
        return f"{nbytes / KIB:.1f} KiB"
    return f"{nbytes} bytes"
