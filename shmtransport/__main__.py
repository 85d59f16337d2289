"""Runs the commands of ``diagnostics.cli``, by script or as ``python -m shmtransport``."""

from __future__ import annotations

import io
import sys

_EXIT_ERROR = 2


def main() -> None:
    """Run the command line, or print in one line which package it needs."""
    try:
        from .diagnostics.cli import app

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # an ASCII terminal gets replacements
        app()
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(f"error: the command line needs {missing}: pip install 'shmtransport[cli]'", file=sys.stderr)
        sys.exit(_EXIT_ERROR)


if __name__ == "__main__":
    main()
