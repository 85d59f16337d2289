"""Entry point of the ``shmtransport`` script and of ``python -m shmtransport``; the commands are in ``commands``."""

from __future__ import annotations

import io
import sys

_EXIT_ERROR = 2


def main() -> None:
    """Run the command line, or say in one line what it needs to be installed."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(f"error: the command line needs {missing}: pip install 'shmtransport[cli]'", file=sys.stderr)
        sys.exit(_EXIT_ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where its encoding has not all that is printed
    app()


if __name__ == "__main__":
    main()
