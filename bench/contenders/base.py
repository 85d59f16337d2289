"""What a contender must do: answer a tensor of N bytes with another tensor of N bytes, each element plus one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch


class Contender(ABC):
    """One way of calling another process with a tensor.

    ``copies`` says how often one round trip copies the tensor's bytes, kernel included.
    """

    name: ClassVar[str]
    copies: ClassVar[str]

    @classmethod
    @abstractmethod
    def serve(cls, address: str, nbytes: int) -> None:
        """In the server's process: print "ready", then answer until a signal."""

    @abstractmethod
    def connect(self, address: str, nbytes: int) -> None:
        """In the client's process: get ready to call with tensors of ``nbytes`` bytes."""

    @abstractmethod
    def call(self, value: int) -> torch.Tensor:
        """One round trip: a uint8 tensor filled with ``value`` goes out, the answer comes back.

        The tensor is written anew for each call, as a caller's would be, by all contenders alike.
        """

    @abstractmethod
    def close(self) -> None:
        """In the client's process: the end."""
