"""A transformers Llama whose weight matrices are somewhere else.

``SplitLlamaForCausalLM`` is a ``LlamaForCausalLM``: ``generate`` with all that it can do is transformers' own. It holds
the embedding and the norms; every product with a weight matrix, or every whole layer, is made by the worker.

Shape suffixes: B batch, T tokens, N tokens whose logits are asked for, D hidden.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from shmtransport import ChannelKind, Client, Statistics
from shmtransport.forks import BoundToProcess

from ..attention import Attention, EagerAttention, RemoteAttention, SdpaAttention
from ..cache import GrowingCache
from ..checkpoint import Checkpoint, Progress, open_checkpoint
from ..config import check_pipeline, default_arena_bytes, parse_dtype, parse_mode
from ..decoder import AttentionContext, DecoderLayer, RMSNorm, decoder
from ..errors import UnsupportedBySplit
from ..masks import causal_mask
from ..operations import Mode
from ..rotary import Rotary, TextLengths
from ..steps import Memory, Steps, run
from ..transformers_versions import CACHE_NAME, CACHE_NAMES, keep_logits, only_cache
from .cache import RemoteCache, refuse_cache_implementation
from .forwards import KeptForwards
from .history import Tokens
from .inputs import fit_inputs
from .keywords import check_keywords
from .link import WorkerLink
from .outputs import Shown, private_logits
from .part import RemoteHead, TrustedPart
from .pipeline import cut, run_in_turn
from .remote import Remote, not_compiled
from .unsupported import SameWeights, check_attention, refusing


@refusing
class SplitLlamaForCausalLM(SameWeights, LlamaForCausalLM, BoundToProcess):  # type: ignore[misc]
    """A Llama split between this process and a worker; make one with ``from_pretrained``.

    One that is dropped without ``close()`` ends its connection all the same, with a ``ResourceWarning``.
    """

    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: LlamaConfig, mode: Mode, link: WorkerLink, arena_bytes: int, pipeline: int = 1) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self._remote = Remote(link, arena_bytes, pipeline)
        self.model = TrustedPart(config, mode, self._remote)
        self.lm_head = RemoteHead(self._remote, config.dtype)
        self.vocab_size = config.vocab_size
        self.mode = mode
        self.link = link
        self._pipeline = pipeline
        self._rotary = Rotary(self.model.frozen_config, torch.device("cpu"))
        self._text_lengths = TextLengths(self.model.frozen_config)
        self._kept = KeptForwards(link, self._remote, self.model.embed)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str] | Checkpoint,
        *,
        worker: str,
        mode: str | Mode = Mode.FUSED,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        wire_dtype: str | torch.dtype | None = None,
        gguf_file: str | None = None,
        arena_bytes: int | None = None,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 30.0,
        reconnect: bool = True,
        revive: Callable[[], None] = lambda: None,
        snapshot: bool = False,
        pipeline: int = 1,
        channel: ChannelKind = "zmq",
        spin_us: float = 0.0,
        progress: Progress | None = None,
    ) -> SplitLlamaForCausalLM:
        """Load this side's weights and connect to the worker, which must serve the same model.

        The model is a directory, a GGUF file, a hub id, or a ``Checkpoint`` that is open already.
        ``worker`` is its address, ``dtype`` that of weights and arithmetic (default, and "auto": the checkpoint's,
        float32 for GGUF; ``torch_dtype`` is its former name), ``wire_dtype`` that of the activations that cross
        (default: the same), ``arena_bytes`` the size of each direction's arena (default: by the model's shape),
        ``timeout_s`` the longest that one call may take;
        ``channel``, ``spin_us`` and ``snapshot`` are those of ``shmtransport.Client``. With ``reconnect`` a worker
        that dies is connected to again, a bounded number of times, and a generation goes on with the same tokens;
        before each try ``revive`` is called, which may start the worker anew. In ``op`` and ``fused`` a prompt may go
        through in up to ``pipeline`` parts, so that both sides compute at the same time: as many times the calls.

        Raises:
            CheckpointError: no model there, or none that can be split.
            WorkerMismatch: the worker serves another model or dtype, or can't serve this mode.
            shmtransport.TransportError: no worker answers, or shared memory is short.
        """
        checkpoint = (
            path_or_hub_id
            if isinstance(path_or_hub_id, Checkpoint)
            else open_checkpoint(os.fspath(path_or_hub_id), gguf_file)
        )
        config = copy.deepcopy(checkpoint.config)
        mode = parse_mode(mode)
        check_pipeline(pipeline, mode)
        dtype = torch_dtype if dtype is None else dtype
        compute = parse_dtype(checkpoint.dtype if dtype in (None, "auto") else dtype)
        wire = compute if wire_dtype is None else parse_dtype(wire_dtype)
        arena_bytes = default_arena_bytes(checkpoint.geometry, mode, wire) if arena_bytes is None else arena_bytes
        config.dtype = compute
        with contextlib.ExitStack() as undo:
            client = undo.enter_context(
                Client(
                    worker,
                    arena_bytes=arena_bytes,
                    timeout_s=timeout_s,
                    connect_timeout_s=connect_timeout_s,
                    snapshot=snapshot,
                    channel=channel,
                    spin_us=spin_us,
                )
            )
            link = WorkerLink(client, checkpoint, mode, compute=compute, wire=wire, reconnect=reconnect, revive=revive)
            undo.callback(link.close)
            with torch.device("meta"):
                model = cls(config, mode, link, arena_bytes, pipeline)
            names = TrustedPart.weight_names(config, mode)
            weights = checkpoint.load(names, compute, torch.device("cpu"), progress)
            nn.Module.load_state_dict(model, weights, assign=True)
            model.generation_config = checkpoint.generation_config()
            undo.pop_all()
        model.requires_grad_(requires_grad=False)
        model.eval()
        return model

    def generate(self, *arguments: Any, **kwargs: Any) -> Any:
        """As transformers' ``generate``; the KV cache is this split's unless another is given or named.

        Raises:
            UnsupportedBySplit: a ``cache_implementation`` that the worker's KV can't stand for, or an output that this
                split does not have.
        """
        cache = only_cache(**{name: kwargs.pop(name, None) for name in CACHE_NAMES})
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        try:
            return super().generate(*arguments, **kwargs)
        finally:
            self._kept.end_sessions()

    def new_cache(self, reserved: int = 0) -> Cache:
        """An empty KV cache of the kind that this split uses, for about ``reserved`` tokens a row."""
        if self.mode.worker_keeps_kv:
            return self._kept.new_cache(reserved)
        return GrowingCache(self.link.geometry.layers, reserved)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """A hook of transformers: here it knows how long the generation may get."""
        if generation_config.assistant_early_exit is not None:
            raise UnsupportedBySplit(
                "assistant_early_exit: a split always goes through all layers; pass assistant_model"
            )
        named = generation_config.cache_implementation
        if self.mode.worker_keeps_kv:
            refuse_cache_implementation(named, self.mode)
        own = named in (None, "dynamic") or self.mode.worker_keeps_kv
        if own and generation_config.use_cache is not False and model_kwargs.get(CACHE_NAME) is None:
            generation_config.cache_implementation = None
            model_kwargs[CACHE_NAME] = self.new_cache(max_cache_length)
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    @not_compiled  # type: ignore[untyped-decorator]
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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As ``LlamaForCausalLM.forward``: logits [B, T or ``logits_to_keep``, V].

        The KV cache is taken by each of transformers' names for it.

        Raises:
            UnsupportedBySplit: gradients are asked for, or hidden states or attentions that this split does not have.
        """
        check_keywords(kwargs, self.loss_function)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        source: torch.Tensor = cast("torch.Tensor", input_ids if inputs_embeds is None else inputs_embeds)
        self._refuse_gradients(source)
        shown = self._outputs(output_hidden_states, output_attentions)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = only_cache(past_key_values=past_key_values, cache=cache)
        if cache is None and use_cache:
            cache = self.new_cache()
        tokens = fit_inputs(
            source,
            attention_mask,
            position_ids,
            cache,
            config=self.model.frozen_config,
            dtype=self.dtype,
            lengths=self._text_lengths,
        )
        if cache is None and self.mode.worker_keeps_kv:
            cache = self.new_cache()  # for this forward alone
        logits = self._run(tokens, cache, logits_to_keep, shown)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=shown.hidden_states(),
            attentions=None if shown.attentions is None else tuple(shown.attentions),
            **{CACHE_NAME: cache if use_cache else None},
        )

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, Any], *arguments: Any, **kwargs: Any
    ) -> None:
        """As transformers', for those implementations that give the numbers of a split's own attention.

        Raises:
            UnsupportedBySplit: it is another one.
        """
        check_attention(attn_implementation)
        super().set_attn_implementation(attn_implementation, *arguments, **kwargs)

    def statistics(self) -> Statistics:
        """What the transport has done for this model."""
        return self.link.client.statistics()

    def close(self) -> None:
        """End the connection; the worker frees all that it kept for this model."""
        self.link.close()

    def __enter__(self) -> SplitLlamaForCausalLM:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        link: WorkerLink | None = self.__dict__.get("link")
        if link is not None and not link.closed:
            address = link.client.address
            link.close()
            warnings.warn(f"a split model of the worker at {address} was dropped: close() it", ResourceWarning, 2, self)

    def _run(
        self, tokens: Tokens, cache: Cache | None, logits_to_keep: int | torch.Tensor, shown: Shown
    ) -> torch.Tensor:
        """The forward: private logits. One that fails leaves the cache as it was: repeated, it adds no token twice."""
        past = 0 if cache is None else int(cache.get_seq_length())
        forward = self._remotely if self.mode.worker_keeps_kv else self._here
        try:
            return private_logits(forward(tokens, cache, logits_to_keep, shown), self.dtype, self.link.client.address)
        except BaseException:
            if isinstance(cache, (GrowingCache, RemoteCache)) and cache.get_seq_length() != past:
                cache.rewind(past)
            raise

    def _here(
        self, tokens: Tokens, cache: Cache | None, logits_to_keep: int | torch.Tensor, shown: Shown
    ) -> torch.Tensor:
        """The forward of the splits where attention and the KV are this side's: logits."""
        hidden_BTD = self.model.embed(tokens.source)
        shown.add([hidden_BTD])
        attention = self._attention(shown.attentions)
        config = self.model.frozen_config
        if config._attn_implementation != attention.implementation:  # noqa: SLF001 - as where it is set
            config = copy.copy(config)
            config._attn_implementation = attention.implementation  # noqa: SLF001
        # What is shown is shown whole; a part needs to find the parts before it in a cache that grows, and to know that
        # it attends to none after it, which the caller's own mask may want.
        prepared = tokens.mask is not None and tokens.mask.dim() == 4
        together = 1 if shown.anything or prepared or not isinstance(cache, GrowingCache) else self._pipeline
        parts = cut(hidden_BTD.shape[1], together)
        mask = causal_mask(
            config,
            hidden_BTD,
            tokens.mask,
            cache,
            sequences_BS=tokens.sequences,
            may_be_none=len(parts) == 1 and (attention.takes_none or hidden_BTD.shape[1] == 1),
        )
        mask = attention.prepare(mask, hidden_BTD.dtype)
        past = 0 if cache is None else cache.get_seq_length()
        cos_sin = self._rotary(tokens.positions, hidden_BTD.dtype, tokens.lengths)
        context = AttentionContext(cos_sin, mask, cache, attention)
        if len(parts) == 1:
            hidden_BTD = run(self._steps(hidden_BTD, context, shown), self._remote.perform)
        else:
            forwards = [self._steps(hidden_BTD[:, part], context.part(part, past), shown) for part in parts]
            hidden_BTD = torch.cat(run_in_turn(forwards, self._remote.begin), dim=1)
        return self._logits(hidden_BTD, logits_to_keep, shown)

    def _steps(self, hidden_BTD: torch.Tensor, context: AttentionContext, shown: Shown) -> Steps:
        layers = cast("Sequence[DecoderLayer]", self.model.layers)
        return decoder(layers, hidden_BTD, context, self._remote, lambda hidden_BTD: shown.add([hidden_BTD]))

    def _remotely(
        self, tokens: Tokens, cache: Cache | None, logits_to_keep: int | torch.Tensor, shown: Shown
    ) -> torch.Tensor:
        """The forward of the splits where the worker keeps the KV: logits."""
        if not isinstance(cache, RemoteCache):
            raise UnsupportedBySplit(
                f"past_key_values is a {type(cache).__name__}: in mode {self.mode.value} the worker keeps the KV; "
                "pass one made by new_cache()"
            )
        if tokens.mask is not None and tokens.mask.dim() != 2:
            raise UnsupportedBySplit(
                f"in mode {self.mode.value} the attention mask must be [batch, tokens]; use mode fused or op"
            )
        if tokens.positions.is_floating_point():
            raise UnsupportedBySplit(f"in mode {self.mode.value} position_ids must be integers; use mode fused or op")
        tokens = tokens._replace(positions=tokens.positions.to(torch.int64))
        source = tokens.source
        if self.mode is Mode.LAYER:
            if shown.wants_hidden:
                shown.add([self.model.embed(source)])
            hidden_BTD = self._kept.layers(tokens, cache, shown.part_adder(self.dtype))
            return self._logits(hidden_BTD.to(self.dtype), logits_to_keep, shown)
        last = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > 0 else 0
        wanted = min(last or source.shape[1], source.shape[1])
        logits = self._kept.stack(tokens, cache, wanted)
        return keep_logits(logits, logits_to_keep)

    def _logits(self, hidden_BTD: torch.Tensor, logits_to_keep: int | torch.Tensor, shown: Shown) -> torch.Tensor:
        norm = cast("RMSNorm", self.model.norm)
        if shown.wants_hidden:
            shown.replace_last(norm(hidden_BTD, Memory(hidden_BTD.device, self.dtype)))
        kept = norm(keep_logits(hidden_BTD, logits_to_keep), self._remote)  # of any shape, where a tensor names them
        logits = self._remote.lm_head(kept if kept.dim() == 3 else kept.view(1, -1, kept.shape[-1]))
        return logits.view(*kept.shape[:-1], -1)

    def _attention(self, weights: list[torch.Tensor] | None) -> Attention:
        if self.mode is Mode.OP:
            return RemoteAttention(weights)
        return SdpaAttention() if weights is None else EagerAttention(weights)

    def _refuse_gradients(self, source: torch.Tensor) -> None:
        if self.training:
            raise UnsupportedBySplit("a split model can't be trained: no gradient crosses to the worker; call eval()")
        if torch.is_grad_enabled() and (source.requires_grad or any(p.requires_grad for p in self.parameters())):
            raise UnsupportedBySplit(
                "a gradient is asked for, and none crosses to the worker: use torch.no_grad(), or inputs and "
                "parameters without requires_grad"
            )

    def _outputs(self, hidden_states: bool | None, attentions: bool | None) -> Shown:
        hidden_states = self.config.output_hidden_states if hidden_states is None else hidden_states
        attentions = self.config.output_attentions if attentions is None else attentions
        if hidden_states and self.mode is Mode.STACK:
            raise UnsupportedBySplit("output_hidden_states: in mode stack they never leave the worker; use mode layer")
        if attentions and self.mode.worker_keeps_kv:
            raise UnsupportedBySplit(
                f"output_attentions: in mode {self.mode.value} the worker attends; use mode fused or op"
            )
        return Shown(bool(hidden_states), bool(attentions))
