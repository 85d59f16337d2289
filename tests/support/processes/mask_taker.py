"""Takes masks from a file until it is killed, and prints each: ``mask_taker.py MODEL MASKS``."""

import os
import sys
from pathlib import Path

from llama_split.checkpoint import QuantisedCheckpoint, open_checkpoint
from llama_split.shields.dealer import FileMasks


def main() -> None:
    checkpoint = open_checkpoint(sys.argv[1])
    weights = QuantisedCheckpoint(checkpoint)
    masks = FileMasks(Path(sys.argv[2]), checkpoint, weights)
    while True:
        for matrix in weights.widths:
            for row in masks.take(matrix, 3).mask_Nk:
                os.write(1, f"{row.numpy().tobytes()[:16].hex()}\n".encode())


main()
