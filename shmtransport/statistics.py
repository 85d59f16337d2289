"""What one client or server has done: counters while it runs, a frozen ``Statistics`` to look at."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .units import KIB, MIB


@dataclass(frozen=True)
class Statistics:
    """Totals since the client or server was made; seconds are of the wall clock.

    On a client ``call_seconds`` runs from submitting a call to having its reply; on a server it is the time in
    handlers. ``serialize_seconds`` and ``deserialize_seconds`` cover making and reading control messages, with the
    copies into the arena that they needed. ``bytes_copied`` counts tensor bytes copied into an arena; tensors that
    already lay in it add nothing.
    """

    calls: int = 0
    failures: int = 0
    call_seconds: float = 0.0
    serialize_seconds: float = 0.0
    deserialize_seconds: float = 0.0
    tensor_bytes_sent: int = 0
    tensor_bytes_received: int = 0
    control_bytes_sent: int = 0
    control_bytes_received: int = 0
    bytes_copied: int = 0
    tensors_copied: int = 0

    def rows(self) -> list[tuple[str, str]]:
        """Column titles and values of the printed table, in order."""
        calls = max(self.calls, 1)

        def each(seconds: float) -> str:
            return f"{seconds / calls * 1e3:.3f} ms/call"

        return [
            ("calls", f"{self.calls}"),
            ("time", each(self.call_seconds)),
            ("serialise", each(self.serialize_seconds)),
            ("deserialise", each(self.deserialize_seconds)),
            ("tensors sent", f"{self.tensor_bytes_sent / MIB:.1f} MiB"),
            ("tensors received", f"{self.tensor_bytes_received / MIB:.1f} MiB"),
            ("copied in", f"{self.bytes_copied / MIB:.1f} MiB"),
            ("control sent", f"{self.control_bytes_sent / KIB:.1f} KiB"),
            ("control received", f"{self.control_bytes_received / KIB:.1f} KiB"),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(title), len(value)) for title, value in rows]
        lines = [
            "  ".join(title.rjust(width) for (title, _), width in zip(rows, widths, strict=True)),
            "  ".join(value.rjust(width) for (_, value), width in zip(rows, widths, strict=True)),
        ]
        return "\n".join(lines)


class Counters:
    """The mutable totals behind a ``Statistics``."""

    def __init__(self) -> None:
        self.calls = 0
        self.failures = 0
        self.call_seconds = 0.0
        self.serialize_seconds = 0.0
        self.deserialize_seconds = 0.0
        self.tensor_bytes_sent = 0
        self.tensor_bytes_received = 0
        self.control_bytes_sent = 0
        self.control_bytes_received = 0
        self.bytes_copied = 0
        self.tensors_copied = 0

    def snapshot(self) -> Statistics:
        return Statistics(**{field.name: getattr(self, field.name) for field in fields(Statistics)})
