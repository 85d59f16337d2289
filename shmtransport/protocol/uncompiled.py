"""Keeps torch.compile away from what it can't compile: sockets, locks, shared memory.

A compiled function breaks into two graphs where it calls one of ours, and everything below the call runs uncompiled.
``torch.compiler.disable`` would do this, but it imports the compiler, which takes longer than the rest of this package.
So this module does to a function what ``disable`` does, with the part of torch that is loaded anyway.
"""

from __future__ import annotations

import contextlib
from types import FunctionType
from typing import Any, TypeVar

import torch

Class = TypeVar("Class", bound=type)

_REASON = "a call to another process can't be compiled"


def uncompiled(kind: Class) -> Class:
    """Exclude a class's methods, and all that they call, from compilation."""
    for member in vars(kind).values():
        function = member.fget if isinstance(member, property) else member
        if isinstance(function, FunctionType):
            _exclude(function)
    return kind


def _exclude(function: Any) -> None:
    function._torchdynamo_disable = True  # a compiled caller breaks its graph here
    function._torchdynamo_disable_msg = _REASON
    with contextlib.suppress(AttributeError):  # torch 2.7 lacks this, and compiles what the function calls
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
