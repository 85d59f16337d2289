"""Entry point of the ``llama-split`` script and of ``python -m llama_split``; the commands are in ``commands``."""

from __future__ import annotations

import os
import sys

# Two processes compute in turn: a thread that spins while it has nothing to do would take the other's core. The
# worker's may for some 0.1 ms, which is as long as the gaps between the products of a layer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if sys.argv[1:2] == ["worker"]:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_EXIT_ERROR = 2
_EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line, or say in one line what it needs to be installed."""
    try:
        from .commands import run

        run()
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(_EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(f"error: the command line needs {missing}: pip install 'shmtransport[llama]'", file=sys.stderr)
        sys.exit(_EXIT_ERROR)


if __name__ == "__main__":
    main()
