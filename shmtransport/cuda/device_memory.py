"""Memory on a GPU that two processes share: one makes it, the other opens it.

Rules that it keeps:

* what crosses is a file descriptor, which the kernel carries, and a description of fixed length, which only the driver
  reads; nothing is pickled;
* memory of a peer is used only if the driver says that it is as large as was agreed.
"""

from __future__ import annotations

import time
from typing import Any

from ..errors import DeviceError, PeerProtocolError
from ..units import size_text
from .driver import ask, errors_in_words, libraries
from .gpu import Gpu

DESCRIPTION_BYTES = 64  # of CUmemPoolPtrExportData
_MADE_WITHIN_S = 1.0


class DeviceMemory:
    """A buffer on a GPU; ``address`` is where it begins in this process. It is freed with this object.

    Args:
        buffer: cuda-core's.
        resource: The pool that it belongs to, which lives as long.
        nbytes: How much of it is used.
    """

    def __init__(self, buffer: Any, resource: Any, nbytes: int) -> None:
        self._buffer = buffer
        self._resource = resource
        self._nbytes = nbytes
        self.address = int(buffer.handle)

    def __len__(self) -> int:
        """Return its size in bytes."""
        return self._nbytes

    @classmethod
    def make(cls, gpu: Gpu, nbytes: int) -> DeviceMemory:
        """Make memory that another process may open.

        Raises:
            DeviceError: There is too little, or the driver can't share memory.
        """
        core = libraries().core
        stream = gpu.new_stream()
        with gpu.current(), errors_in_words():
            options = core.DeviceMemoryResourceOptions(ipc_enabled=True)
            resource = core.DeviceMemoryResource(gpu.ordinal, options)
            buffer = resource.allocate(nbytes, stream=stream)
            made = gpu.fence(stream)
        deadline = time.monotonic() + _MADE_WITHIN_S
        while not made.done():
            if time.monotonic() > deadline:
                raise DeviceError(f"cuda:{gpu.ordinal} has not allocated {size_text(nbytes)} in {_MADE_WITHIN_S:g} s")
            time.sleep(1e-4)
        return cls(buffer, resource, nbytes)

    @property
    def descriptor(self) -> int:
        """The file descriptor of its pool, to send to the other process; it stays this process's own."""
        return int(self._resource.allocation_handle)

    def description(self) -> bytes:
        """Return what the other process needs besides the file descriptor."""
        _, (description, _) = self._buffer.ipc_descriptor.__reduce__()
        return bytes(description)

    def open_peers(self, gpu: Gpu, nbytes: int, descriptor: int, description: bytes) -> DeviceMemory:
        """Open the memory that another process has made in the way in which this one was made.

        Args:
            gpu: The GPU that both use.
            nbytes: The size that was agreed.
            descriptor: The file descriptor that it has sent; the caller closes it.
            description: What it has sent with that.

        Raises:
            PeerProtocolError: It is not what was agreed.
            DeviceError: It can't be opened here.
        """
        if len(description) != DESCRIPTION_BYTES:
            raise PeerProtocolError(f"the peer described its memory on the GPU in {len(description)} bytes")
        core = libraries().core
        describe, _ = self._buffer.ipc_descriptor.__reduce__()
        stream = gpu.new_stream()
        with gpu.current(), errors_in_words():
            resource = core.DeviceMemoryResource.from_allocation_handle(gpu.ordinal, descriptor)
            buffer = core.Buffer.from_ipc_descriptor(resource, describe(description, nbytes), stream=stream)
            opened = DeviceMemory(buffer, resource, nbytes)
            start, size = ask("cuMemGetAddressRange", opened.address)
        if int(start) + int(size) < opened.address + nbytes:
            raise PeerProtocolError(f"the peer's memory on the GPU has not the agreed {size_text(nbytes)}")
        return opened
