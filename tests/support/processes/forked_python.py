"""Stands for the interpreter of a worker of pytest-xdist: ``forked_python.py ADDRESS …``; the worker is forked instead.

It hands its standard input, output and error to the process that listens at the address, and ends with the worker.
"""

import os
import socket
import sys

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
    connection.connect(sys.argv[1])
    socket.send_fds(connection, [b"0"], [0, 1, 2])
    os.closerange(0, 2)
    connection.recv(1)
