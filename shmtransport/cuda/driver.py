"""NVIDIA's driver, by way of cuda-bindings and cuda-core: imported when it is first needed, its errors in words."""

from __future__ import annotations

import contextlib
import functools
import resource
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import DeviceError
from ..units import size_text


class Libraries(NamedTuple):
    """The modules ``cuda.bindings.driver`` and ``cuda.core``."""

    driver: Any
    core: Any


_loading = threading.Lock()  # cuda-core can't be imported by several threads at once


@functools.cache
def libraries() -> Libraries:
    """Load the driver, once.

    Raises:
        DeviceError: A package or the driver is missing.
    """
    with _loading:
        return _load()


def _load() -> Libraries:
    try:
        from cuda import core
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(
            f"no GPU can be used, since {error.name or error} is missing: pip install 'shmtransport[cuda]'"
        ) from error
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:  # from cuda-bindings
        raise DeviceError("no GPU can be used: there is no libcuda.so.1; install NVIDIA's driver") from error
    if status:
        raise DeviceError(f"no GPU can be used: cuInit failed with {_name_of(driver, status)}")
    return Libraries(driver, core)


def ask(function: str, *arguments: Any) -> Any:
    """Call a function of the driver, and return what it returns besides its status.

    Raises:
        DeviceError: It failed.
    """
    driver = libraries().driver
    status, *values = getattr(driver, function)(*arguments)
    if status:
        raise DeviceError(f"{function} failed with {_name_of(driver, status)}{_remedy(int(status))}")
    return values[0] if len(values) == 1 else values


@contextlib.contextmanager
def errors_in_words() -> Iterator[None]:
    """Raise what cuda-core raises as this package's error."""
    try:
        yield
    except (DeviceError, MemoryError):
        raise
    except Exception as error:
        raise DeviceError(f"the GPU's driver failed: {error}") from error


def _name_of(driver: Any, status: Any) -> str:
    _, name = driver.cuGetErrorName(status)
    return name.decode() if name else f"error {int(status)}"


_OUT_OF_MEMORY, _NOT_PERMITTED, _NOT_SUPPORTED = 2, 800, 801
_STICKY = {700, 702, 708, 709, 710, 714, 715, 716, 717, 718, 719}
"""Errors after which a context can't be used any more, see CUDA's ``CUresult``."""


def _remedy(status: int) -> str:
    if status in (_NOT_PERMITTED, _NOT_SUPPORTED):
        return ": this machine does not allow it, as in confidential-computing mode"
    if status == _OUT_OF_MEMORY:
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        limit = "none" if soft == resource.RLIM_INFINITY else size_text(soft)
        return f": too little memory; use smaller arenas, or raise the limit on locked memory (ulimit -l, now {limit})"
    if status in _STICKY:
        return ": an earlier failure left the GPU's context unusable; restart this process"
    return ""
