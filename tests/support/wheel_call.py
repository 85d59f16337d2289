"""A call with an installed wheel: ``wheel_call.py TREE``; fails if what it imports is not the wheel's own."""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

import torch

import shmtransport
from shmtransport import Client, Server
from shmtransport.core import CORE, CORE_REASON


def main() -> None:
    place = Path(shmtransport.__file__)
    tree = Path(sys.argv[1])
    if place.is_relative_to(tree / "shmtransport"):
        raise SystemExit(f"{place} is the tree's own package, not the wheel's")
    if CORE != "native":
        raise SystemExit(f"the wheel has no compiled core: {CORE_REASON}")
    with tempfile.TemporaryDirectory() as directory, Server(f"ipc://{directory}/server.ipc") as server:
        server.register("double", lambda x: torch.mul(x, 2, out=server.empty(x.shape, x.dtype)))
        serving = threading.Thread(target=server.serve)
        serving.start()
        for channel in ("zmq", "doorbell"):
            with Client(server.address, channel=channel) as client:
                x = client.empty((3,), torch.bfloat16)
                x.fill_(21.0)
                result = client.call("double", x)
                if result.tolist() != [42.0] * 3 or client.statistics().tensors_copied:
                    raise SystemExit(f"{channel}: {result}, {client.statistics()}")
        server.stop()
        serving.join()
    print(f"shmtransport {shmtransport.__version__} of {place.parent}: {CORE} core, both channels work")


if __name__ == "__main__":
    main()
