"""What is placed on a Ray cluster, and what tensors become on their way through it. Needs no Ray."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_split.boundary.choices import KEY_VARIABLE
from llama_split.errors import LlamaSplitError
from llama_split.placement.ray.packing import Packed, pack, unpack
from llama_split.placement.ray.plan import Plan


def test_values_may_be_text_as_on_a_command_line() -> None:
    plan = Plan.of({"replicas": "2", "cpus": "1.5", "random_weights": "true", "mode": "stack"})
    assert (plan.replicas, plan.cpus, plan.random_weights, plan.mode) == (2, 1.5, True, "stack")


def test_the_key_comes_from_the_environment_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "from the environment")
    assert Plan.of({}).api_key == "from the environment"
    assert Plan.of({"api_key": "given"}).api_key == "given"
    assert Plan.of({"api_key": ""}).api_key == "from the environment"


def test_no_worker_and_no_log_gets_the_key() -> None:
    """Only the trusted processes need it."""
    plan = Plan.of({"api_key": "open sesame", "mode": "stack"})
    assert plan.without_key() == Plan(mode="stack")
    assert "sesame" not in repr(plan)
    assert "'mode': 'stack'" in repr(plan)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": "many"}, "replicas"),
        ({"replicas": 0}, "replicas is 0"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas is 2; it must be 3"),
        ({"workers": 0}, "workers is 0"),
        ({"elsewhere": -1}, "elsewhere is -1"),
        ({"cpus": 0}, "cpus is 0"),
        ({"cpus": float("nan")}, "cpus is nan"),
        ({"gpus": -1}, "gpus is -1"),
        ({"gpus": 1.5}, "gpus is 1.5; above 1 it must be a whole number"),
        ({"max_kv_tokens": 1}, "max_kv_tokens is 1; it must be 64"),
        ({"mode": "fast"}, "mode 'fast'"),
        ({"dtype": "int4"}, "int4"),
        ({"channel": "http"}, "'http'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_placed(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(LlamaSplitError, match=told):
        Plan.of(wrong)


@given(
    workers=st.integers(1, 4),
    elsewhere=st.integers(0, 4),
    cpus=st.sampled_from([0.5, 1.0, 2.0]),
    gpus=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_bundles_have_room_for_all_that_stands_in_them(workers: int, elsewhere: int, cpus: float, gpus: float) -> None:
    """Each bundle holds exactly its actors; those beside the trusted process never stand on another node."""
    plan = Plan(workers=workers, elsewhere=elsewhere, cpus=cpus, gpus=gpus)
    needed = [{"CPU": 0.0, "GPU": 0.0} for _ in plan.bundles]
    needed[0]["CPU"] += cpus  # the trusted process is in the first one, by Serve's rule
    for worker in range(workers + elsewhere):
        needed[plan.bundle_of(worker)]["CPU"] += cpus
        needed[plan.bundle_of(worker)]["GPU"] += gpus
        on_another_node = plan.strategy == "STRICT_SPREAD" and plan.bundle_of(worker) > 0
        assert plan.is_elsewhere(worker) == on_another_node
    assert [{"CPU": one["CPU"], "GPU": one.get("GPU", 0.0)} for one in plan.bundles] == needed
    assert plan.strategy == ("STRICT_SPREAD" if elsewhere else "STRICT_PACK")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_a_packed_tensor_comes_out_the_same(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Wherever it is in a value, with any strides; everything else is left as it was."""
    tensor = (torch.rand(shape) * 9).to(dtype)
    value = (
        {"start": {"rows": tensor, "past": 3, "none": None}, "keep": [1, 2]},
        [tensor.mT if tensor.dim() > 1 else tensor],
    )
    packed = pack(value)
    assert isinstance(packed[0]["start"]["rows"], Packed)
    found = unpack(packed, lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype))
    assert found[0]["start"]["past"] == 3
    assert found[0]["start"]["none"] is None
    assert found[0]["keep"] == [1, 2]
    for got, sent in ((found[0]["start"]["rows"], tensor), (found[1][0], value[1][0])):
        assert got.dtype == dtype
        assert torch.equal(got, sent)


def test_a_tensor_is_packed_without_a_copy() -> None:
    """Its bytes are the tensor's own memory."""
    tensor = torch.arange(6, dtype=torch.float32)
    packed = pack(tensor)
    tensor[0] = 9.0
    assert unpack(packed, lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype))[0] == 9.0
