"""The server of ``bench gpu``: ``python -m bench.device.server ADDRESS DEVICE``; prints "ready" once it listens."""

from __future__ import annotations

import sys

import torch

from shmtransport import Server


def main() -> None:
    """Serve until a signal."""
    address, device = sys.argv[1:3]
    server = Server(address, device=device, spin_us=100.0)
    made: dict[int, torch.Tensor] = {}

    @server.method
    def nothing() -> None:
        """Answer at once."""

    @server.method
    def take(x: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the GPU, and return one number of it, which comes behind the whole copy."""
        there: torch.Tensor = server.to_device(x)
        return there[-1:]

    @server.method
    def give(nbytes: int) -> torch.Tensor:
        """Return a tensor on the GPU that is there already."""
        if nbytes not in made:
            made[nbytes] = torch.ones(nbytes, dtype=torch.uint8, device=device)
        return made[nbytes]

    @server.method
    def lend(_x: torch.Tensor, nbytes: int) -> torch.Tensor:
        """Return a tensor of the caller's arena on the GPU."""
        return server.empty((nbytes,), torch.uint8, device=device)

    with server:
        print("ready", flush=True)
        server.serve()


if __name__ == "__main__":
    main()
