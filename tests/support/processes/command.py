"""The command line, as ``python -m llama_split`` runs it, in a process that has imported it already."""

import os
import sys

from llama_split.__main__ import main

encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
main()
