"""Writes sizes and times as people read them."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def size_text(nbytes: int) -> str:
    """A number of bytes in the largest unit of which it has at least one."""
    if nbytes >= MIB:
        return f"{nbytes / MIB:.1f} MiB"
    if nbytes >= KIB:
        return f"{nbytes / KIB:.1f} KiB"
    return f"{nbytes} bytes"


def time_text(seconds: float) -> str:
    """Format a time in µs, ms or s, with three digits."""
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"
