"""The split works over either channel."""

from __future__ import annotations

import pytest
import torch

from llama_split import SplitLlamaForCausalLM
from llama_split.boundary.operations import Mode
from shmtransport import CHANNEL_KINDS, ChannelKind
from tests.support.llamas import Small, Worker
from tests.support.prompts import SHARED, single_prompt


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("channel", CHANNEL_KINDS)
def test_greedy_tokens_do_not_depend_on_the_channel(
    plain: Small, plain_worker: Worker, channel: ChannelKind, mode: Mode
) -> None:
    """Over ZeroMQ and over the doorbell, every token is the unsplit model's."""
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, do_sample=False)
    with SplitLlamaForCausalLM.from_pretrained(
        plain.path, worker=plain_worker.address, mode=mode, channel=channel
    ) as split:
        assert split.workers[0].client.channel == channel
        assert torch.equal(split.generate(**single_prompt(), **SHARED, do_sample=False), expected)
