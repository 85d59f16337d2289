"""Every exception of both packages survives pickle, copy and a process pool, with its text and its fields."""

from __future__ import annotations

import copy
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil
from concurrent.futures import ProcessPoolExecutor
from types import ModuleType
from typing import Any, get_type_hints

import pytest

import llama_split
import shmtransport
from shmtransport import PeerProtocolError, RemoteError


def _modules() -> list[ModuleType]:
    """All modules but those that need Ray, which an ordinary test run does without."""
    return [
        importlib.import_module(module.name)
        for package in (shmtransport, llama_split)
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        if not module.name.endswith("__main__") and ".placement.ray." not in module.name
    ]


def _exceptions() -> list[type[BaseException]]:
    kinds = {
        kind
        for module in _modules()
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, BaseException) and kind.__module__ == module.__name__
    }
    return sorted(kinds, key=lambda kind: kind.__qualname__)


_VALUES: dict[Any, Any] = {
    str | None: "some field",
    str: "some text",
    bytes: b"\x01",
    int: 3,
    PeerProtocolError: PeerProtocolError("it lies"),
}


def _made(kind: type[BaseException]) -> BaseException:
    """One of this class, from arguments of the types that its constructor names."""
    if not inspect.isfunction(kind.__init__):
        return kind("some text: 3 of 4")
    hints = get_type_hints(kind.__init__)
    names = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    return kind(*(_VALUES[hints[name]] for name in names))


def _pickled(error: BaseException, protocol: int) -> Any:
    return pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - our own bytes


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, BaseException):
        return type(one) is type(other) and str(one) == str(other) and _fields_alike(vars(one), vars(other))
    return bool(one == other)


def _fields_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_alike(value, other[name]) for name, value in one.items())


def test_there_are_exceptions_to_test() -> None:
    """The search finds those that are public, and those that aren't."""
    names = {kind.__name__ for kind in _exceptions()}
    assert {"RemoteError", "PeerDied", "BrokenPeer", "WorkerMismatch", "UnsupportedBySplit"} <= names
    assert len(names) >= 23


@pytest.mark.parametrize("kind", _exceptions(), ids=lambda kind: kind.__name__)
def test_an_exception_survives_pickle_and_copy(kind: type[BaseException]) -> None:
    """Same class, same text, same fields, in every protocol; and made again from its own ``args``."""
    error = _made(kind)
    copies = [_pickled(error, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (*copies, copy.copy(error), copy.deepcopy(error), kind(*error.args)):
        assert other is not error
        assert _alike(other, error)


def _raise_remote_error() -> None:
    raise RemoteError("ValueError", "bad input")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_pool_passes_a_remote_error_on() -> None:
    """Neither breaks an executor nor leaves a pool's result pending."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, context) as executor, context.Pool(1) as pool:
        for get in (executor.submit(_raise_remote_error).result, pool.apply_async(_raise_remote_error).get):
            with pytest.raises(RemoteError, match="handler raised ValueError: bad input") as caught:
                get(60)
            assert (caught.value.type_name, caught.value.message) == ("ValueError", "bad input")
