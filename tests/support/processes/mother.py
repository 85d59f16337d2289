"""Runs scripts in children forked from a process that has imported torch already: ``mother.py FD [SCRIPT ARGUMENT …]``.

SCRIPT, if there is one, is run first: whatever it imports, its children need not import. FD is the socket that
``tests.support.forking.serve`` reads.
"""

from __future__ import annotations

import gc
import runpy
import socket
import sys

from shmtransport import *  # noqa: F403 - its names are imported on first use, and so is torch
from tests.support import forking

socket_of_tests = socket.socket(fileno=int(sys.argv[1]))
if first := sys.argv[2:]:
    sys.argv = first
    runpy.run_path(first[0])
gc.collect()
gc.freeze()  # no child looks for garbage among the imports, least of all at its end
script = forking.serve(socket_of_tests)
if script is not None:
    forking.run(script)
