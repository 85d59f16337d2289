"""The tested versions of torch and transformers. This module imports neither.

transformers' own generation calls a model's forward, and its keywords change between minor versions. An untested
version could pass the KV cache under an unknown name, and the text would be wrong without an error. So versions outside
the range are refused before anything is computed. pyproject.toml states the same ranges.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from ..errors import LlamaSplitError, MissingPackage


class Range(NamedTuple):
    """Versions from ``oldest`` up to, but not including, ``end``; None: no end is known."""

    oldest: tuple[int, ...]
    end: tuple[int, ...] | None

    def __contains__(self, found: object) -> bool:
        return isinstance(found, tuple) and self.oldest <= found and (self.end is None or found < self.end)

    def __str__(self) -> str:
        """The range as pyproject.toml writes it."""
        return f">={_text(self.oldest)}" + ("" if self.end is None else f",<{_text(self.end)}")


TESTED: dict[str, Range] = {
    "torch": Range((2, 7), None),
    "transformers": Range((5, 20), (5, 25)),
}


def check_requirements() -> None:
    """Compare the installed versions with the tested ranges.

    Raises:
        MissingPackage: a package is not installed.
        LlamaSplitError: an installed version is outside the tested range.
    """
    for package, tested in TESTED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            raise MissingPackage.named(package) from None
        wanted = f"{package}{tested}"
        if _release(found) not in tested:
            raise LlamaSplitError(
                f"{package} {found} is installed, and llama_split is tested with {wanted}: pip install '{wanted}'"
            )


def _release(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (5, 24, 0) for ``5.24.0.dev0``."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in numbers)
