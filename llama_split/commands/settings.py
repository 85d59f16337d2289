"""Where a setting comes from: an option, the environment, or the default, in this order.

A setting from the environment is reported, so that a stale variable is noticed. Nothing here imports torch, so that a
command can start its worker first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

MODEL_VARIABLE = "LLAMA_MODEL_PATH"
ADDRESS_VARIABLE = "LLAMA_IPC_PATH"
DTYPE_VARIABLE = "LLAMA_DTYPE"
DEVICE_VARIABLE = "LLAMA_GPU_DEVICE"


@dataclass(frozen=True)
class Settings:
    """Resolves the options of one command; ``report`` is called with a line for each variable in force."""

    report: Callable[[str], None]

    @overload
    def pick(self, option: str | None, variable: str, default: str) -> str: ...

    @overload
    def pick(self, option: str | None, variable: str, default: None) -> str | None: ...

    def pick(self, option: str | None, variable: str, default: str | None) -> str | None:
        """Choose the value of a setting, and report it if it comes from the environment.

        Args:
            option: what the command line says; None: nothing.
            variable: the environment variable; empty counts as not set.
            default: used if neither is given.
        """
        if option is not None:
            return option
        value = os.environ.get(variable)
        if not value:
            return default
        self.report(f"{variable}={value} (from the environment) is in force")
        return value


def parse_address(text: str) -> str:
    """Return a ZeroMQ address; a bare path stands for the socket at that path."""
    return f"ipc://{text}" if text.startswith("/") else text
