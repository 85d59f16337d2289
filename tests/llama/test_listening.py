"""Where a worker listens that computes on a GPU."""

from __future__ import annotations

import logging

import pytest
import torch

from llama_split.worker.listening import server_for


def test_a_worker_whose_gpu_the_transport_cannot_use_serves_all_the_same(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without NVIDIA's packages or driver torch copies by itself; one warning reports it, and why."""
    with caplog.at_level(logging.WARNING), server_for(address, torch.device("cuda:99")) as server:
        assert server.device_path == "no GPU"
    (told,) = caplog.messages
    assert "cuda:99" in told
    assert "torch's own copies" in told


def test_a_worker_on_the_processor_has_no_gpu(address: str, caplog: pytest.LogCaptureFixture) -> None:
    """And nothing is told."""
    with server_for(address, torch.device("cpu"), spin_us=0) as server:
        assert server.device_path == "no GPU"
    assert not caplog.messages
