"""A /dev/shm of this run's own: what other processes of the machine do there is neither seen nor disturbed.

A mount namespace costs a millisecond. Root may make one; others make it in a user namespace, where that is allowed.
"""

from __future__ import annotations

import ctypes
import os

_CLONE_NEWNS, _CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x4000, 0x4_0000
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _become_a_user_who_may_mount() -> None:
    """The same user and group as before, who may mount in what is unshared next; children by exec may not."""
    user, group = os.geteuid(), os.getegid()
    _checked(_libc.unshare(_CLONE_NEWUSER))
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{file}", "w") as target:
            target.write(text)


def take_private_memory() -> bool:
    """Mount an empty /dev/shm that this thread and the processes that it starts have alone; False where it can't be.

    Called again, it makes another for the processes that are started from then on.
    """
    try:
        try:
            _checked(_libc.unshare(_CLONE_NEWNS))
        except PermissionError:
            _become_a_user_who_may_mount()
            _checked(_libc.unshare(_CLONE_NEWNS))
        _checked(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
        _checked(_libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", _MS_NOSUID | _MS_NODEV, b"mode=1777"))
    except OSError:
        return False
    return True
