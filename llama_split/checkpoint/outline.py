"""The names and shapes of a Llama's parameters, and which side holds which; nothing here imports torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..boundary.geometry import Geometry
from ..boundary.operations import DOWN, GATE_UP, OUT_PROJ, QKV, Mode, Operation

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
LAYER_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")

STACKED: dict[Operation, tuple[str, ...]] = {
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    OUT_PROJ: ("self_attn.o_proj",),
    GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    DOWN: ("mlp.down_proj",),
}
"""The matrices of a layer that one operation multiplies with, stacked into one."""

_ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
_MLP = tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))

LAYER_PREFIX = re.compile(r"^model\.layers\.(0|[1-9][0-9]{0,9})\.")
# What a linear layer or the embedding may have besides weight and bias: scales of a quantisation, parts of an adapter.
FOREIGN = re.compile(
    r"^(model\.embed_tokens|lm_head|model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj)"
    r"\.(?!weight$|bias$)"
)


def layer_name(index: int, rest: str) -> str:
    """The full name of a layer's parameter."""
    return f"model.layers.{index}.{rest}"


def parameter_shape(geometry: Geometry, name: str) -> tuple[int, ...]:
    """The shape of a parameter."""
    g = geometry
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (g.vocab, g.hidden),
        LM_HEAD: (g.vocab, g.hidden),
        FINAL_NORM: (g.hidden,),
        "input_layernorm.weight": (g.hidden,),
        "post_attention_layernorm.weight": (g.hidden,),
        "self_attn.q_proj.weight": (g.query_width, g.hidden),
        "self_attn.k_proj.weight": (g.kv_width, g.hidden),
        "self_attn.v_proj.weight": (g.kv_width, g.hidden),
        "self_attn.o_proj.weight": (g.hidden, g.query_width),
        "mlp.gate_proj.weight": (g.intermediate, g.hidden),
        "mlp.up_proj.weight": (g.intermediate, g.hidden),
        "mlp.down_proj.weight": (g.hidden, g.intermediate),
    }
    within_layer = LAYER_PREFIX.sub("", name)
    if within_layer.endswith(".bias"):
        return shapes[within_layer.removesuffix("bias") + "weight"][:1]
    return shapes[within_layer]


def trusted_names(layers: int, mode: Mode) -> list[str]:
    """The names of the parameters that the trusted side holds of a model with this number of layers."""
    own_layers = range(0 if mode.worker_keeps_kv else layers)
    first = [] if mode is Mode.OP else [EMBEDDING]
    last = [] if mode is Mode.STACK else [FINAL_NORM]
    return [*first, *last, *(layer_name(index, norm) for index in own_layers for norm in LAYER_NORMS)]


@dataclass(frozen=True)
class Outline:
    """A model's parameters.

    Attributes:
        geometry: the model's sizes.
        attention_bias: the linear layers of attention have biases.
        mlp_bias: those of the MLP have.
        lm_head: the name of the output matrix: the embedding's if the two are one.
    """

    geometry: Geometry
    attention_bias: bool
    mlp_bias: bool
    lm_head: str

    def matrices(self) -> list[str]:
        """All matrices and biases that the model computes with; a tied output matrix is the embedding again."""
        biased = [*(_ATTENTION if self.attention_bias else ()), *(_MLP if self.mlp_bias else ())]
        parts = [*(f"{part}.weight" for part in (*_ATTENTION, *_MLP)), *(f"{part}.bias" for part in biased)]
        return [
            EMBEDDING,
            self.lm_head,
            *(layer_name(index, part) for index in range(self.geometry.layers) for part in parts),
        ]

    def norms(self) -> list[str]:
        """The weights of all norms."""
        return [FINAL_NORM, *(layer_name(index, norm) for index in range(self.geometry.layers) for norm in LAYER_NORMS)]

    def parameters(self) -> list[str]:
        """All parameters of the model."""
        return [*self.matrices(), *self.norms()]

    def worker_groups(self, *, embedding: bool, layers: range | None = None) -> dict[object, list[str]]:
        """The names of the parameters that a worker holds; each group is stacked into one tensor.

        Args:
            embedding: the embedding is among them, for trusted sides in mode op.
            layers: the layers that this worker holds; the last layer's worker holds the output matrix. None: all.
        """
        layers = range(self.geometry.layers) if layers is None else layers
        groups: dict[object, list[str]] = {
            (index, operation, parameter): [layer_name(index, f"{matrix}.{parameter}") for matrix in matrices]
            for index in layers
            for operation, matrices in STACKED.items()
            for parameter in self._parameters_of(operation)
        }
        single = [layer_name(index, norm) for index in layers for norm in LAYER_NORMS]
        if layers.stop == self.geometry.layers:
            single += [FINAL_NORM, self.lm_head]
        if embedding:
            single.append(EMBEDDING)
        groups.update({name: [name] for name in single})
        return groups

    def _parameters_of(self, operation: Operation) -> tuple[str, ...]:
        biased = self.attention_bias if operation in (QKV, OUT_PROJ) else self.mlp_bias
        return ("weight", "bias") if biased else ("weight",)
