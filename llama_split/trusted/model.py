"""A transformers Llama whose weight matrices are held by a worker.

``SplitLlamaForCausalLM`` is a ``LlamaForCausalLM``: ``generate()`` is transformers' own, unchanged. In every split the
worker holds the matrices of the layers and the output matrix. ``TrustedPart`` is what this side holds.

Shape suffixes: B batch, T tokens, N tokens whose logits are asked for, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from shmtransport import ChannelKind, Statistics
from shmtransport.memory.forks import BoundToProcess

from ..boundary.choices import check_pipeline, default_arena_bytes, parse_mode
from ..boundary.compute import parse_dtype
from ..boundary.operations import REVEALED, Mode
from ..checkpoint import Checkpoint, Progress, open_checkpoint
from ..errors import InvalidInput, UnsupportedBySplit
from ..model.decoder import RMSNorm
from ..model.kv_cache import GrowingCache
from ..model.program import HeapWorkspace
from ..model.rotary import TextLengths
from ..shields.base import Shield, ShieldReport
from ..shields.named import shield_named
from .batched_sessions import BatchedSessions
from .connection import Reachable, open_connection
from .history import ForwardInput
from .inputs import fit_inputs
from .keywords import check_keywords
from .local_forwards import LocalForwards
from .offload import Offload, not_compiled
from .outputs import RequestedOutputs, private_logits
from .paged import PagedCache, fit_batching, take_paged
from .part import RemoteHead, TrustedPart
from .remote_cache import RemoteCache, refuse_cache_implementation
from .session_forwards import SessionForwards
from .transformers_versions import CACHE_NAME, CACHE_NAMES, keep_logits, only_cache
from .unsupported import SameWeights, check_attention, refuse_gradients, refusing
from .worker_client import WorkerClient
from .workers import Workers, connect


@refusing
class SplitLlamaForCausalLM(SameWeights, LlamaForCausalLM, BoundToProcess):  # type: ignore[misc]
    """A Llama split between this process and a worker; ``from_pretrained`` makes one.

    Close it, or use it in a ``with`` block. One that is dropped without ``close()`` ends its connection too, with a
    ``ResourceWarning``.

    Args:
        config: the model's configuration; its dtype is that of weights and arithmetic.
        mode: the split.
        workers: the connected workers.
        arena_bytes: size of each direction's arena, of each worker.
        pipeline: the most chunks of a prompt in flight at once at a worker.
        shield: what stands between the model and the workers. Default: nothing.
    """

    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(
        self,
        config: LlamaConfig,
        mode: Mode,
        workers: Workers,
        arena_bytes: int,
        pipeline: int = 1,
        shield: Shield | None = None,
    ) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self._offload = Offload(workers, arena_bytes, pipeline, shield, config.dtype)
        self.model = TrustedPart(config, mode, self._offload)
        self.lm_head = RemoteHead(self._offload, config.dtype)
        self.vocab_size = config.vocab_size
        self.mode = mode
        self.workers = workers
        self._text_lengths = TextLengths(self.model.frozen_config)
        self._local = LocalForwards(self.model, mode, workers, self._offload, pipeline)
        self._sessions = SessionForwards(workers, self._offload, self.model.embed, pipeline)
        self._batched = BatchedSessions(self._sessions)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str] | Checkpoint,
        *,
        worker: str | Reachable | Sequence[str | Reachable],
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
        spin_us: float | None = None,
        shield: str | Shield | None = None,
        progress: Progress | None = None,
    ) -> SplitLlamaForCausalLM:
        """Load this side's weights and connect to the worker, or to several; they must serve the same model.

        Args:
            path_or_hub_id: a model's directory, a GGUF file, a hub id, or an open ``Checkpoint``.
            worker: the worker's address, for example ``ipc:///tmp/worker.ipc``; or the addresses of the workers that
                share the layers, in the order of these. A ``connection.Reachable`` stands for one that has none on
                this machine.
            mode: the split: op, fused, layer or stack.
            dtype: of weights and arithmetic. None and "auto": the checkpoint's, which is float32 for GGUF.
            torch_dtype: former name of ``dtype``.
            wire_dtype: of the activations that cross. None: as ``dtype``.
            gguf_file: the GGUF file to open in a directory that holds several.
            arena_bytes: size of each direction's arena, of each worker. None: derived from the model's shape.
            timeout_s: the longest that one call may take, in seconds.
            connect_timeout_s: how long to wait for each worker, in seconds.
            reconnect: connect again when a worker dies, a bounded number of times; a generation continues with the
                same tokens.
            revive: called before each such try; may start the worker again.
            snapshot: as in ``shmtransport.Client``.
            pipeline: split a prompt so that up to this many chunks are in flight at once at each worker, and all sides
                compute at the same time; the number of calls grows by this factor and by the number of workers. In
                layer and stack only with several workers.
            channel: as in ``shmtransport.Client``: "zmq" or "doorbell".
            spin_us: as in ``shmtransport.Client``, in microseconds.
            shield: what stands between the model and the workers: "verify" checks their results; "otp" also hides what
                they are sent, in fused, from workers that compute in int8; or a ``Shield``. None and "none": nothing.
            progress: called with how many tensors are loaded, of how many; with a shield, then with how many matrices.

        Raises:
            CheckpointError: there is no model, or none that can be split.
            WorkerMismatch: a worker serves another model or dtype, or can't serve this mode; or several don't hold each
                layer once.
            shmtransport.TransportError: no worker answers, or shared memory is short.
        """
        checkpoint = open_checkpoint(path_or_hub_id, gguf_file)
        mode = parse_mode(mode)
        shield = shield_named(shield, mode)
        named = list(worker) if isinstance(worker, Sequence) and not isinstance(worker, str) else [worker]
        check_pipeline(pipeline, mode, len(named))
        dtype = torch_dtype if dtype is None else dtype
        compute = parse_dtype(checkpoint.dtype if dtype in (None, "auto") else dtype)
        wire = compute if wire_dtype is None else parse_dtype(wire_dtype)
        of_workers = compute
        if shield is not None:
            shield.check_wire(wire_dtype)
            of_workers, wire = shield.computes or compute, shield.crosses or wire
        arena_bytes = default_arena_bytes(checkpoint.geometry, mode, wire) if arena_bytes is None else arena_bytes
        open_client = functools.partial(
            open_connection,
            arena_bytes=arena_bytes,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            snapshot=snapshot,
            channel=channel,
            spin_us=spin_us,
        )
        check = functools.partial(
            WorkerClient,
            checkpoint=checkpoint,
            mode=mode,
            compute=of_workers,
            wire=wire,
            reconnect=reconnect,
            revive=revive,
        )
        with contextlib.ExitStack() as undo:
            workers = connect(named, open_client, check, mode)
            undo.callback(workers.close)
            config = copy.deepcopy(checkpoint.config)
            config.dtype = compute
            with torch.device("meta"):
                model = cls(config, mode, workers, arena_bytes, pipeline, shield)
            model._load(checkpoint, compute, progress)
            if shield is not None:
                shield.load(checkpoint, compute, wire, progress)
            undo.pop_all()
        return model

    def _load(self, checkpoint: Checkpoint, dtype: torch.dtype, progress: Progress | None) -> None:
        """Replace the parameters, which are on the meta device, by the checkpoint's."""
        names = TrustedPart.weight_names(checkpoint.config, self.mode)
        weights = checkpoint.load(names, dtype, torch.device("cpu"), progress)
        nn.Module.load_state_dict(self, weights, assign=True)
        self.generation_config = checkpoint.generation_config()
        self.requires_grad_(requires_grad=False)
        self.eval()

    def generate(self, *arguments: Any, **kwargs: Any) -> Any:
        """As transformers' ``generate``, with this split's own KV cache unless another is passed or named.

        Raises:
            UnsupportedBySplit: the worker's KV can't stand in for this ``cache_implementation``, or an output is
                requested that this split does not have.
        """
        cache = only_cache(**{name: kwargs.pop(name, None) for name in CACHE_NAMES})
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        try:
            return super().generate(*arguments, **kwargs)
        finally:
            self._sessions.end_sessions()

    @property
    def _hides(self) -> bool:
        """Whether a shield hides texts from the workers."""
        return self._offload.shield is not None and self._offload.shield.reveals is not None

    @property
    def revealed(self) -> str:
        """What the worker sees, in words."""
        shield = self._offload.shield
        return REVEALED[self.mode] if shield is None or shield.reveals is None else shield.reveals

    def shield_report(self) -> ShieldReport | None:
        """What the shield has done since this was last asked; None without a shield."""
        return None if self._offload.shield is None else self._offload.shield.report()

    def new_cache(self, reserved: int = 0) -> Cache:
        """An empty KV cache as this split needs it, with room for about ``reserved`` tokens per row."""
        if self.mode.worker_keeps_kv:
            return self._sessions.new_cache(reserved)
        return GrowingCache(self.workers.geometry.layers, reserved)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """A hook of transformers, called when it knows how long the generation may get."""
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
        """As ``LlamaForCausalLM.forward``.

        Args:
            input_ids: token ids [B, T].
            attention_mask: [B, all tokens], or [B or 1, heads or 1, T, all tokens] in op and fused.
            position_ids: [B or 1, T]. None: those after what the cache holds.
            past_key_values: the KV cache to continue.
            inputs_embeds: embeddings [B, T, D], instead of ``input_ids``.
            labels: token ids [B, T] to compute a loss for.
            use_cache: return a KV cache. None: what the model's configuration says.
            logits_to_keep: how many last tokens to return logits for, 0 for all; or a tensor of indices.
            output_hidden_states: return them; not in mode stack.
            output_attentions: return attention weights; in op and fused only.
            cache: transformers' newer name for ``past_key_values``.
            kwargs: arguments of the loss, and those of transformers that have no effect.

        Returns:
            Logits [B, N, V], and what was requested.

        Raises:
            UnsupportedBySplit: gradients or outputs are requested that this split does not have.
            InvalidInput: the input does not fit together.
        """
        batch = take_paged(past_key_values if cache is None else cache, kwargs)
        check_keywords(kwargs, self.loss_function)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        source: torch.Tensor = cast("torch.Tensor", input_ids if inputs_embeds is None else inputs_embeds)
        refuse_gradients(self, source)
        if batch is not None:
            return self._forward_batch(source, position_ids, attention_mask, batch, logits_to_keep)
        requested = RequestedOutputs.of(self.config, self.mode, output_hidden_states, output_attentions)
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
        logits = self._run(tokens, cache, logits_to_keep, requested)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=requested.hidden_states(),
            attentions=None if requested.attentions is None else tuple(requested.attentions),
            **{CACHE_NAME: cache if use_cache else None},
        )

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *arguments: Any,
        **kwargs: Any,
    ) -> Any:
        """As transformers' ``init_continuous_batching``, which ``generate_batch`` uses as well.

        Raises:
            UnsupportedBySplit: what is asked for needs the KV on this side, and the worker keeps it in this mode.
        """
        most_sessions = min(worker.most_sessions for worker in self.workers)
        used = self.generation_config if generation_config is None else generation_config
        config = fit_batching(continuous_batching_config, used, self.mode, most_sessions, hides=self._hides)
        return super().init_continuous_batching(generation_config, config, *arguments, **kwargs)

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, Any], *arguments: Any, **kwargs: Any
    ) -> None:
        """As in transformers, for the implementations with the same results as a split's own attention.

        Raises:
            UnsupportedBySplit: it is another implementation.
        """
        check_attention(attn_implementation)
        super().set_attn_implementation(attn_implementation, *arguments, **kwargs)

    def statistics(self) -> Statistics:
        """The transport's counters for this model's connections, added up."""
        return Statistics.total([worker.client.statistics() for worker in self.workers])

    def close(self) -> None:
        """End the connections; the workers free everything that they hold for them."""
        try:
            self.workers.close()
        finally:
            if self._offload.shield is not None:
                self._offload.shield.close()

    def __enter__(self) -> SplitLlamaForCausalLM:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        workers: Workers | None = self.__dict__.get("workers")
        if workers is not None and not workers.closed:
            self.close()
            where = " and ".join(workers.addresses)
            warnings.warn(f"a split model of the worker at {where} was dropped: close() it", ResourceWarning, 2, self)

    def _forward_batch(
        self,
        source: torch.Tensor,
        positions: torch.Tensor | None,
        mask: torch.Tensor | None,
        cache: PagedCache,
        logits_to_keep: int | torch.Tensor,
    ) -> CausalLMOutputWithPast:
        """A forward of continuous batching: the new tokens of several requests in one row [1, T]."""
        if positions is None:
            raise InvalidInput("a forward over a paged cache needs position_ids")
        requested = RequestedOutputs(hidden_states=False, attentions=False)
        tokens = ForwardInput(source, positions.to(torch.int64), lengths=self._text_lengths.of(positions))
        with self._offload.forward():
            if self.mode is Mode.STACK:
                rows = keep_logits(torch.arange(source.shape[1])[None, :, None], logits_to_keep).flatten().tolist()
                logits = self._batched.stack(tokens, cache, rows)
            elif self.mode is Mode.LAYER:
                logits = self._logits(self._batched.layers(tokens, cache).to(self.dtype), logits_to_keep, requested)
            else:
                logits = self._logits(self._local.batch(tokens, mask, cache), logits_to_keep, requested)
        return CausalLMOutputWithPast(logits=private_logits(logits, self.dtype, self.workers.last.client.address))

    def _run(
        self,
        tokens: ForwardInput,
        cache: Cache | None,
        logits_to_keep: int | torch.Tensor,
        requested: RequestedOutputs,
    ) -> torch.Tensor:
        """A forward, as private logits. If it fails, the cache is as before: repeating it caches no token twice."""
        past = 0 if cache is None else int(cache.get_seq_length())
        try:
            with self._offload.forward():
                if self.mode.worker_keeps_kv:
                    logits = self._run_on_worker(tokens, cache, logits_to_keep, requested)
                else:
                    logits = self._logits(self._local.layers(tokens, cache, requested), logits_to_keep, requested)
            return private_logits(logits, self.dtype, self.workers.last.client.address)
        except BaseException:
            if isinstance(cache, (GrowingCache, RemoteCache)) and cache.get_seq_length() != past:
                cache.rewind(past)
            raise

    def _run_on_worker(
        self,
        tokens: ForwardInput,
        cache: Cache | None,
        logits_to_keep: int | torch.Tensor,
        requested: RequestedOutputs,
    ) -> torch.Tensor:
        """A forward of the splits where the worker attends and keeps the KV: logits."""
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
            if requested.wants_hidden:
                requested.add([self.model.embed(source)])
            hidden_BTD = self._sessions.layers(tokens, cache, requested.chunk_adder(self.dtype))
            return self._logits(hidden_BTD.to(self.dtype), logits_to_keep, requested)
        last = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > 0 else 0
        wanted = min(last or source.shape[1], source.shape[1])
        logits = self._sessions.stack(tokens, cache, wanted)
        return keep_logits(logits, logits_to_keep)

    def _logits(
        self, hidden_BTD: torch.Tensor, logits_to_keep: int | torch.Tensor, requested: RequestedOutputs
    ) -> torch.Tensor:
        """The final norm and the output matrix."""
        norm = cast("RMSNorm", self.model.norm)
        if requested.wants_hidden:
            requested.replace_last(norm(hidden_BTD, HeapWorkspace(hidden_BTD.device, self.dtype)))
        kept = norm(
            keep_logits(hidden_BTD, logits_to_keep), self._offload.last_workspace
        )  # any shape, by a tensor's indices
        logits = self._offload.lm_head(kept if kept.dim() == 3 else kept.view(1, -1, kept.shape[-1]))
        return logits.view(*kept.shape[:-1], -1)
