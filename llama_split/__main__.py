"""Entry point of the ``llama-split`` script, of ``python -m llama_split``, and of this folder's path as a script.

A worker that this package starts is run by its path: ``python -m`` would take the current directory's files first.
"""

from __future__ import annotations

import io
import os
import sys

if not __package__:  # run by its path: Python has put this folder first, whose files are no modules of their own
    from importlib.util import module_from_spec, spec_from_file_location

    _FOLDER = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _FOLDER]
    _SPEC = spec_from_file_location("llama_split", os.path.join(_FOLDER, "__init__.py"))
    if _SPEC is not None and _SPEC.loader is not None:
        sys.modules["llama_split"] = module_from_spec(_SPEC)
        _SPEC.loader.exec_module(sys.modules["llama_split"])

from llama_split.errors import missing_package
from llama_split.import_path import leave_current_directory

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
    leave_current_directory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where its encoding has not all that is printed
    try:
        from llama_split.commands import run

        run()
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(_EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(_EXIT_ERROR)


if __name__ == "__main__":
    main()
