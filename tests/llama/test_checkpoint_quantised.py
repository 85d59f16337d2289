"""Quantised weights are refused, by method, field or tensor: the loader doesn't apply their scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from llama_split.checkpoint import EMBEDDING, FINAL_NORM, LM_HEAD, open_checkpoint
from tests.support.checkpoints import Tensors, as_gguf, changed, edit_config, refusal
from tests.support.llamas import Small, random_llama

UP = "model.layers.1.mlp.up_proj"


def copy(small: Small, directory: Path, **config: Any) -> Path:
    changed(small, directory, lambda _tensors: None)
    edit_config(directory, **config)
    return directory


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("method", ["compressed-tensors", "gptq", "awq", "bitsandbytes", "fp8", "no such method"])
def test_a_quantisation_in_the_configuration_is_refused_by_its_method(
    plain: Small, tmp_path: Path, field: str, method: str
) -> None:
    """Whatever the method is, known to transformers or not, and whatever the files hold."""
    text = refusal(copy(plain, tmp_path, **{field: {"quant_method": method, "bits": 4}}))
    assert method in text
    assert field in text


@pytest.mark.parametrize("config", [{"bits": 4}, [1], "fp8", True])
def test_a_quantisation_of_no_known_form_is_refused(plain: Small, tmp_path: Path, config: Any) -> None:
    """An unreadable field doesn't count as none."""
    assert "quantised" in refusal(copy(plain, tmp_path, quantization_config=config))


@pytest.mark.parametrize("config", [None, {}])
def test_an_empty_quantisation_is_none(plain: Small, tmp_path: Path, config: Any) -> None:
    """Some tools write the field into every configuration."""
    assert open_checkpoint(str(copy(plain, tmp_path, quantization_config=config))).geometry.layers == 3


@pytest.mark.parametrize("name", [f"{UP}.weight", EMBEDDING, LM_HEAD, FINAL_NORM])
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "I32"),
        (torch.bool, "BOOL"),
    ],
    ids=str,
)
def test_a_stored_dtype_that_is_no_float_of_16_bits_or_more_is_refused(
    plain: Small, tmp_path: Path, name: str, dtype: torch.dtype, kind: str
) -> None:
    """When the model is opened, by tensor and dtype, whichever side needs the tensor."""

    def quantise(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(dtype)

    text = refusal(changed(plain, tmp_path, quantise))
    assert name in text
    assert kind in text


@pytest.mark.parametrize(
    "part",
    [
        *(
            f"{UP}.{part}"
            for part in ("weight_scale", "weight_scale_inv", "qweight", "qzeros", "scales", "g_idx", "SCB")
        ),
        *(f"{UP}.weight.{part}" for part in ("absmax", "quant_map", "quant_state.bitsandbytes__nf4")),
        *(f"{UP}.{part}" for part in ("lora_A.default.weight", "base_layer.weight", "weight_packed", "W_q")),
        "layers.1.mlp.up_proj.weight_scale",
        "lm_head.weight_scale",
        "model.embed_tokens.weight_scale",
    ],
)
def test_scales_and_adapters_beside_plain_weights_are_refused(plain: Small, tmp_path: Path, part: str) -> None:
    """A linear layer has a weight and a bias; anything else beside them would have to be applied."""
    text = refusal(changed(plain, tmp_path, lambda tensors: tensors.update({part: torch.ones(1)})))
    assert part in text


def test_what_is_no_part_of_a_weight_is_left_alone(plain: Small, tmp_path: Path) -> None:
    """Old checkpoints store the rotary frequencies; transformers ignores these as well."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "value_head.weight": torch.ones(2)}
    assert open_checkpoint(str(changed(plain, tmp_path, lambda tensors: tensors.update(extra)))).geometry.layers == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_wider_and_half_floats_are_read(plain: Small, tmp_path: Path, dtype: torch.dtype) -> None:
    """Converting these needs no scale, so they are not quantised."""

    def convert(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    checkpoint = open_checkpoint(str(changed(plain, tmp_path, convert)))
    name = f"{UP}.weight"
    loaded = checkpoint.load([name], torch.float32, torch.device("cpu"))[name]
    assert torch.equal(loaded, plain.unsplit.state_dict()[name].to(dtype).float())


@pytest.mark.parametrize("kind", ["I8", "I32"])
def test_integers_in_a_gguf_file_are_refused(tmp_path: Path, kind: str) -> None:
    """GGUF's own quantisations carry their scales; plain integers don't."""
    data = np.ones((96, 64), {"I8": np.int8, "I32": np.int32}[kind])

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_up.weight", data)

    assert kind in refusal(as_gguf(random_llama(), tmp_path / "model.gguf", more=add, leave_out="blk.0.ffn_up"))
