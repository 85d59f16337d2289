"""The soak's short run: nothing is lost, leaked or wrong, and the soak notices what is wrong."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from tests.adversarial.soak.content import fill, is_reply_to, reply_to
from tests.support.process import ROOT


def test_a_short_soak_finds_nothing_wrong() -> None:
    """Some seconds of calls on both channels at both kinds of server, with kills: every reply right, nothing left."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.adversarial.soak", "--minutes", "0.04", "--seed", "1998"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert "calls" in summary
    assert "MessageTooLarge" in summary


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex128])
def test_the_soak_sees_a_single_wrong_byte(dtype: torch.dtype) -> None:
    """A reply is right only if every byte, the shape and the dtype are."""
    sent = fill(torch.empty((3, 5), dtype=dtype), random.Random(1))
    reply = reply_to(sent, torch.empty_like(sent))
    assert is_reply_to(sent, reply)
    assert not is_reply_to(sent, reply.reshape(5, 3))
    assert not is_reply_to(sent, reply.tolist())
    reply.reshape(-1).view(torch.uint8)[-1] ^= 1
    assert not is_reply_to(sent, reply)
