"""One fresh pair of processes: ``python -m bench.pair CONTENDER BYTES SECONDS`` prints its round trips as JSON.

With ``--serve ADDRESS`` it is the server's half.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time

import torch

from .contenders import CONTENDERS

_WARM_UP_CALLS = 20
_MIN_CALLS = 20


def _measure(name: str, nbytes: int, seconds: float) -> dict[str, object]:
    contender = CONTENDERS[name]()
    samples: list[float] = []
    with tempfile.TemporaryDirectory(prefix="shmt-bench-") as directory:
        address = f"ipc://{directory}/s"
        command = [sys.executable, "-m", "bench.pair", name, str(nbytes), "0", "--serve", address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                if server.stdout is None or server.stdout.readline().strip() != "ready":
                    raise SystemExit(f"the server of {name!r} did not start")
                contender.connect(address, nbytes)
                started = time.perf_counter()
                while len(samples) < _WARM_UP_CALLS + _MIN_CALLS or time.perf_counter() - started < seconds:
                    value = len(samples) % 200
                    before = time.perf_counter()
                    answer = contender.call(value)
                    samples.append(time.perf_counter() - before)
                    if not bool((answer == value + 1).all()):
                        raise SystemExit(f"{name!r} gave a wrong answer")
                    del answer
                contender.close()
            finally:
                server.terminate()
    return {"name": name, "nbytes": nbytes, "samples": samples[_WARM_UP_CALLS:]}


def main() -> None:
    """Entry point of either half."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("nbytes", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--serve")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.serve:
        CONTENDERS[arguments.contender].serve(arguments.serve, arguments.nbytes)
    else:
        print(json.dumps(_measure(arguments.contender, arguments.nbytes, arguments.seconds)))


if __name__ == "__main__":
    main()
