"""The life of an object that has a name in /dev/shm: it is made, found, unlinked, and removed if its owner has died.

Rules that it keeps:

* names are random (128 bits) and have one form; a name of another form is never opened;
* the owner holds a lock on the object for as long as its process runs (see ``owner_lock``). Whether it lives is asked
  of that lock, never judged by age or process id;
* only an object without a living owner is removed. While its name is removed no process can become its owner: an
  object that is just being made is either left alone, or its maker finds it gone and makes another;
* a process never opens an object of its own by name: closing that descriptor could end the owner's lock.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..errors import SegmentError
from . import owner_lock
from .ownership import Role, registry

DIRECTORY = "/dev/shm"
_MAKING_ATTEMPTS = 10

Made = TypeVar("Made")


class NamedObjects:
    """All objects of one sort, such as segments.

    Args:
        noun: what an error calls one of them.
        prefix: how their names begin.
    """

    def __init__(self, noun: str, prefix: str) -> None:
        self.noun = noun
        self._prefix = prefix
        self._form = re.compile(rf"{prefix}[0-9a-f]{{32}}")

    def is_name(self, name: str) -> bool:
        """Whether a string, which a peer may have sent, has the form of these objects' names."""
        return self._form.fullmatch(name) is not None

    def file(self, name: str) -> str:
        """Where Linux keeps the object of this name."""
        return f"{DIRECTORY}/{name[1:]}"

    def names(self) -> Iterator[str]:
        """All such names that exist now, of the living and of the dead."""
        with contextlib.suppress(OSError):  # no /dev/shm: nothing in it
            for file in os.listdir(DIRECTORY):
                if self.is_name("/" + file):
                    yield "/" + file

    def create(self, make: Callable[[str], Made | None], role: Role = "") -> Made:
        """Make a new object.

        Args:
            make: makes it under the name that it is given, claims it, and cleans up after itself if it fails, except
                for the name; it returns None if the object was removed before it was claimed.
            role: see ``Registry.add_name``.

        Raises:
            SegmentError: all that were made were removed at once.
            What ``make`` raises.
        """
        for _ in range(_MAKING_ATTEMPTS):
            name = f"{self._prefix}{secrets.token_hex(16)}"
            try:
                registry.add_name(name, role)
                made = make(name)
            except BaseException:
                self.unlink(name)
                raise
            if made is not None:
                return made
            self.unlink(name)
        raise SegmentError(f"every {self.noun} that was made was removed at once: does something sweep {DIRECTORY}?")

    def claim(self, fd: int) -> bool:
        """Become the owner of a new object, until the process ends; False if it was removed before that."""
        return owner_lock.claim(fd) and os.fstat(fd).st_nlink > 0

    def unlink(self, name: str) -> None:
        """Remove the name of an object that this process owns, or that its owner has given to it."""
        with contextlib.suppress(FileNotFoundError):  # the peer, which may unlink as well, was faster
            os.unlink(self.file(name))
        registry.drop_name(name)

    def owner_of(self, name: str) -> int | None:
        """The process that owns the object of this name; None if it is dead.

        0 or a negative number: it lives where this process can't see it (another pid namespace).

        Raises:
            OSError: there is no such object, or it is another user's.
        """
        if registry.role_of(name) is not None:
            return os.getpid()
        fd = self._open(name)
        try:
            return owner_lock.holder(fd)
        finally:
            os.close(fd)

    def remove_if_dead(self, name: str) -> bool:
        """Remove the object of this name, which a peer may have sent, if its owner is dead; whether it was removed."""
        if not self.is_name(name) or registry.role_of(name) is not None:
            return False
        try:
            fd = self._open(name)
        except OSError:  # it is gone, or another user's
            return False
        try:
            if not owner_lock.keep_claims_out(fd):
                return False
            os.unlink(self.file(name))
        except (FileNotFoundError, PermissionError):
            return False
        finally:
            os.close(fd)
        return True

    def _open(self, name: str) -> int:
        return os.open(self.file(name), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
