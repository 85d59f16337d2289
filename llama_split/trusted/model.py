"""A transformers Llama whose weight matrices are somewhere else.

``SplitLlamaForCausalLM`` is a ``LlamaForCausalLM``: ``generate`` with all that it can do is transformers' own. It holds
the embedding and the norms; every product with a weight matrix, or every whole layer, is made by the worker.

Shape suffixes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaPreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from shmtransport import ChannelKind, Client, Statistics

from ..cache import GrowingCache
from ..checkpoint import EMBEDDING, FINAL_NORM, LAYER_NORMS, Checkpoint, Progress, layer_name, open_checkpoint
from ..config import default_arena_bytes, parse_dtype, parse_mode
from ..decoder import AttentionContext, DecoderLayer, RMSNorm, decoder, run
from ..errors import UnsupportedBySplit
from ..operations import Mode
from .cache import RemoteCache
from .remote import Remote


class TrustedPart(LlamaPreTrainedModel):  # type: ignore[misc]
    """What the trusted process holds: the embedding, the norms, and rotary attention's cosines."""

    def __init__(self, config: LlamaConfig, mode: Mode) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        own_layers = 0 if mode.worker_keeps_kv else config.num_hidden_layers
        self.layers = nn.ModuleList([DecoderLayer(config, index) for index in range(own_layers)])
        self.norm = None if mode is Mode.STACK else RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    @staticmethod
    def weight_names(config: LlamaConfig, mode: Mode) -> list[str]:
        """The checkpoint's parameters that this part is made of."""
        layers = range(0 if mode.worker_keeps_kv else config.num_hidden_layers)
        last = [] if mode is Mode.STACK else [FINAL_NORM]
        return [EMBEDDING, *last, *(layer_name(index, norm) for index in layers for norm in LAYER_NORMS)]


class SplitLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """A Llama split between this process and a worker; make one with ``from_pretrained``."""

    def __init__(self, config: LlamaConfig, mode: Mode, remote: Remote) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = TrustedPart(config, mode)
        self.vocab_size = config.vocab_size
        self.mode = mode
        self.remote = remote

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str] | Checkpoint,
        *,
        worker: str,
        mode: str | Mode = Mode.FUSED,
        dtype: str | torch.dtype | None = None,
        gguf_file: str | None = None,
        arena_bytes: int | None = None,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 10.0,
        snapshot: bool = False,
        channel: ChannelKind = "zmq",
        spin_us: float = 0.0,
        progress: Progress | None = None,
    ) -> SplitLlamaForCausalLM:
        """Load this side's weights and connect to the worker, which must serve the same model.

        The model is a directory, a GGUF file, a hub id, or a ``Checkpoint`` that is open already.
        ``worker`` is its address, ``dtype`` that of weights, arithmetic and wire (default: the checkpoint's, float32
        for GGUF), ``arena_bytes`` the size of each direction's arena (default: by the model's shape), ``timeout_s``
        the longest that one call may take; ``channel`` and ``spin_us`` are those of ``shmtransport.Client``.

        Raises:
            CheckpointError: no model there, or none that can be split.
            WorkerMismatch: the worker serves another model or dtype.
            shmtransport.TransportError: no worker answers, or shared memory is short.
        """
        checkpoint = (
            path_or_hub_id
            if isinstance(path_or_hub_id, Checkpoint)
            else open_checkpoint(os.fspath(path_or_hub_id), gguf_file)
        )
        config = checkpoint.config
        mode = parse_mode(mode)
        chosen = parse_dtype(dtype if dtype is not None else getattr(config, "dtype", None) or torch.float32)
        arena_bytes = default_arena_bytes(checkpoint.geometry, mode, chosen) if arena_bytes is None else arena_bytes
        config._attn_implementation = "sdpa"  # noqa: SLF001 - transformers' own name for this public choice
        config.dtype = chosen
        client = Client(
            worker,
            arena_bytes=arena_bytes,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            snapshot=snapshot,
            channel=channel,
            spin_us=spin_us,
        )
        try:
            remote = Remote(client, checkpoint, chosen, arena_bytes)
            with torch.device("meta"):
                model = cls(config, mode, remote)
            weights = checkpoint.load(TrustedPart.weight_names(config, mode), chosen, torch.device("cpu"), progress)
            model.load_state_dict(weights, assign=True)
            model.model.rotary_emb = LlamaRotaryEmbedding(config)
            model.generation_config = checkpoint.generation_config()
        except BaseException:
            client.close()
            raise
        model.requires_grad_(requires_grad=False)
        model.eval()
        return model

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *arguments: Any,
        **kwargs: Any,
    ) -> Any:
        """As transformers' ``generate``; the KV cache is this split's unless one is given.

        Raises:
            UnsupportedBySplit: a ``cache_implementation`` where the worker keeps the KV.
        """
        generation = generation_config or self.generation_config
        named = kwargs.get("cache_implementation", generation.cache_implementation)
        if named is not None and self.mode.worker_keeps_kv:
            raise UnsupportedBySplit(
                f"cache_implementation={named!r}: in mode {self.mode.value} the worker keeps the KV"
            )
        uses_cache = kwargs.get("use_cache", generation.use_cache) is not False
        if named is None and uses_cache and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = self.new_cache()
        try:
            return super().generate(inputs, generation_config, *arguments, **kwargs)
        finally:
            kwargs.clear()
            self.remote.end_sessions()

    def new_cache(self) -> Cache:
        """An empty KV cache of the kind that this split uses."""
        if self.mode.worker_keeps_kv:
            return self.remote.new_cache()
        return GrowingCache(self.config.num_hidden_layers)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As ``LlamaForCausalLM.forward``: logits [B, T or ``logits_to_keep``, V].

        Raises:
            UnsupportedBySplit: hidden states or attentions are asked for.
        """
        for unsupported in ("output_hidden_states", "output_attentions"):
            if kwargs.get(unsupported):
                raise UnsupportedBySplit(f"{unsupported}: a split model gives logits only")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        hidden_BTD = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values
        if cache is None and (use_cache or self.mode.worker_keeps_kv):
            cache = self.new_cache()
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(hidden_BTD.shape[1]) + past).unsqueeze(0)
        if self.mode.worker_keeps_kv:
            logits = self._remotely(hidden_BTD, attention_mask, position_ids, cache, logits_to_keep)
        else:
            logits = self._logits(self._fused(hidden_BTD, attention_mask, position_ids, cache), logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def _fused(
        self,
        hidden_BTD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
    ) -> torch.Tensor:
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_BTD,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        context = AttentionContext(self.model.rotary_emb(hidden_BTD, position_ids), mask, cache)
        layers = cast("Sequence[DecoderLayer]", self.model.layers)
        return run(decoder(layers, hidden_BTD, context, self.remote.empty), self.remote.perform)

    def _logits(self, hidden_BTD: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        norm = cast("RMSNorm", self.model.norm)
        return self.remote.lm_head(norm(slice_logits_to_keep(hidden_BTD, logits_to_keep), self.remote.empty))

    def _remotely(
        self,
        hidden_BTD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
        logits_to_keep: int | torch.Tensor,
    ) -> torch.Tensor:
        """The forward of the splits where the worker keeps the KV: logits."""
        if not isinstance(cache, RemoteCache):
            raise UnsupportedBySplit(
                f"past_key_values is a {type(cache).__name__}: in mode {self.mode.value} the worker keeps the KV; "
                "pass one made by new_cache()"
            )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise UnsupportedBySplit(f"in mode {self.mode.value} the attention mask must be [batch, tokens]")
        if self.mode is Mode.LAYER:
            hidden_BTD = self.remote.layers(hidden_BTD, cache, position_ids, attention_mask)
            return self._logits(hidden_BTD, logits_to_keep)
        last = logits_to_keep if isinstance(logits_to_keep, int) else 0
        logits = self.remote.stack(hidden_BTD, cache, position_ids, attention_mask, last)
        kept: torch.Tensor = slice_logits_to_keep(logits, logits_to_keep)
        return kept

    def statistics(self) -> Statistics:
        """What the transport has done for this model."""
        return self.remote.statistics()

    def close(self) -> None:
        """End the connection; the worker frees all that it kept for this model."""
        self.remote.client.close()

    def __enter__(self) -> SplitLlamaForCausalLM:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
