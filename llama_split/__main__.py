"""Entry point of the ``llama-split`` script, of ``python -m llama_split``, and of this file run by its path.

This package runs its own workers by path: ``python -m`` would import files from the current directory first.
"""

from __future__ import annotations

import io
import os
import sys

if not __package__:  # run by its path: Python has put this folder first, but its files are no top-level modules
    from importlib.util import module_from_spec, spec_from_file_location

    _FOLDER = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _FOLDER]
    _SPEC = spec_from_file_location("llama_split", os.path.join(_FOLDER, "__init__.py"))
    if _SPEC is not None and _SPEC.loader is not None:
        sys.modules["llama_split"] = module_from_spec(_SPEC)
        _SPEC.loader.exec_module(sys.modules["llama_split"])

from llama_split.errors import EXIT_ERROR, EXIT_INTERRUPTED, missing_package
from llama_split.placement.import_path import leave_current_directory

# The two processes compute in turn, so an idle thread that spins takes a core from the other process. The worker's
# threads may spin for about 0.1 ms, the length of the gaps between the products of a layer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if sys.argv[1:2] == ["worker"]:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Run the command line, or name in one line the package that is not installed."""
    leave_current_directory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # its encoding may lack characters that are printed
    try:
        from llama_split.commands import run

        run()
    except KeyboardInterrupt:  # before a command has started
        sys.exit(EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    main()
