"""Compare a generation of every split with the unsplit model's: ``python -m tests.llama.every_split``.

Prints the installed versions, then a line for each split; fails where tokens differ.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from llama_split import Mode, SplitLlamaForCausalLM
from tests.support.llamas import random_llama, worker_in_thread
from tests.support.prompts import LONG, padded_prompts

PACKAGES = ("torch", "numpy", "pyzmq", "msgspec", "transformers")


def main() -> None:
    print("Python", sys.version.split()[0], *(f"{package} {version(package)}" for package in PACKAGES))
    unsplit = random_llama(seed=3)
    expected = unsplit.generate(**padded_prompts(), **LONG, do_sample=False)
    wrong = []
    with tempfile.TemporaryDirectory() as path:
        unsplit.save_pretrained(path)
        with worker_in_thread(Path(path)) as worker:
            for mode in Mode:
                with SplitLlamaForCausalLM.from_pretrained(path, worker=worker.address, mode=mode) as split:
                    tokens = split.generate(**padded_prompts(), **LONG, do_sample=False)
                same = torch.equal(tokens, expected)
                print(mode.value, "gives the unsplit model's tokens" if same else "gives other tokens")
                wrong += [] if same else [mode.value]
    if wrong:
        sys.exit(f"other tokens in {', '.join(wrong)}")


if __name__ == "__main__":
    main()
