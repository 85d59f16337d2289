"""Keeps torch.compile out of what it can't compile: sockets, locks and memory of another process.

A compiled function that calls one of ours is broken there into two graphs, and everything below the call runs as it is
written. ``torch.compiler.disable`` would do, but it imports the compiler, which takes longer than all the rest of this
package: what it does to a function is done here by the part of torch that is loaded anyway.
"""

from __future__ import annotations

import contextlib
from types import FunctionType
from typing import Any, TypeVar

import torch

Class = TypeVar("Class", bound=type)

_REASON = "a call to another process can't be compiled"


def uncompiled(kind: Class) -> Class:
    """A class of which no method is compiled, nor anything that its methods call."""
    for member in vars(kind).values():
        function = member.fget if isinstance(member, property) else member
        if isinstance(function, FunctionType):
            _exclude(function)
    return kind


def _exclude(function: Any) -> None:
    function._torchdynamo_disable = True  # a compiled caller breaks its graph here
    function._torchdynamo_disable_msg = _REASON
    with contextlib.suppress(AttributeError):  # torch 2.7 lacks it, and compiles what is below the call
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
