"""The package's public names: imported on first use, and all there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import shmtransport
from tests.support.process import Process


def test_every_public_name_is_there_and_listed() -> None:
    """Also those that are not imported yet."""
    assert set(shmtransport.__all__) <= set(dir(shmtransport))
    for name in shmtransport.__all__:
        assert getattr(shmtransport, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = shmtransport.Nonsense  # type: ignore[attr-defined]


def test_importing_the_package_does_not_import_torch() -> None:
    """Nor does listing its names; taking ``Client`` does, and so does ``import *``."""
    script = (
        "import sys, shmtransport\n"
        "from shmtransport import CHANNEL_KINDS, PeerDied\n"
        "print('Client' in dir(shmtransport), 'torch' in sys.modules)\n"
        "from shmtransport import *\n"
        "print(Client.__module__, 'torch' in sys.modules, shmtransport.Client is Client)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=Process.environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["True False", "shmtransport.endpoints.client True True"]
