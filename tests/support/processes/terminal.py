"""The command line on a terminal of its own, like a user's: ``terminal.py TERMINAL ARGUMENT …``.

Its standard error goes elsewhere. A process that leads a session gets the first terminal that it opens as its own,
where Ctrl-C is a signal.
"""

import os
import runpy
import sys
from pathlib import Path

os.setsid()
terminal = os.open(sys.argv.pop(1), os.O_RDWR)
for standard in (0, 1):
    os.dup2(terminal, standard)
os.close(terminal)
runpy.run_path(str(Path(__file__).with_name("command.py")), run_name="__main__")
