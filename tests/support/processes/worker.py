"""A llama worker that can be killed and started again at once: ``worker.py MODEL ADDRESS [LAYERS]``.

The model, or these of its layers, is loaded once. For each line on standard input a forked child, a process of its own,
serves it and prints its process id when it is ready.
"""

import ctypes
import os
import signal
import sys

import torch

from llama_split.boundary.division import parse_layers
from llama_split.checkpoint import open_checkpoint
from llama_split.worker.service import Service
from llama_split.worker.weights import Weights
from shmtransport import Server

PR_SET_PDEATHSIG = 1


def main() -> None:
    torch.set_num_threads(1)  # no thread pool, which a fork would lose
    path, address, *held = sys.argv[1:]
    checkpoint = open_checkpoint(path)
    layers = parse_layers(held[0], checkpoint.geometry.layers) if held else None
    weights = Weights(checkpoint, torch.float32, torch.device("cpu"), embedding=True, layers=layers)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("loaded", flush=True)
    for _ in sys.stdin:
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            with Server(address) as server:
                Service(server, weights, checkpoint)
                print(os.getpid(), flush=True)
                server.serve()
            os._exit(0)


main()
