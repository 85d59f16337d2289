"""Opens a split model for a command: starts a worker if none was named, opens the model's files, connects.

This takes two steps, so that a prompt can be checked while the worker loads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shmtransport.channels.address import absence, check_connect

from ..boundary.choices import NO_SHIELD, check_dtype, check_pipeline, parse_channel, parse_mode
from ..errors import LlamaSplitError
from ..placement.local import WorkerProcess
from .console import log, notice, notices, progress_bar
from .decoding import overruled, taken_over
from .options import AdvancedOptions, SplitOptions, limit_threads, model_name, open_model
from .settings import ADDRESS_VARIABLE, DEVICE_VARIABLE, DTYPE_VARIABLE, Settings, parse_address

if TYPE_CHECKING:
    import torch

    from ..boundary.operations import Mode
    from ..shields.base import Shield
    from ..trusted.model import SplitLlamaForCausalLM

_SHORT_WAIT_S = 1.0


class Opening:
    """A model's files and tokenizer, and after ``connect`` the split model.

    Args:
        split: which model, how it is split, and which worker.
        advanced: transport, threads and random weights.
        stack: closes everything that is opened.
        verbose: log what both processes do.

    Raises:
        LlamaSplitError: an option can't be used, or there is no such model.
    """

    def __init__(
        self, split: SplitOptions, advanced: AdvancedOptions, stack: contextlib.ExitStack, *, verbose: bool
    ) -> None:
        log(verbose)
        settings = Settings(report=notice)
        dtype = settings.pick(split.dtype, DTYPE_VARIABLE, "float32")
        self._mode = parse_mode(split.mode)
        self._channel = parse_channel(advanced.channel)
        for given in (dtype, split.wire_dtype or dtype):
            check_dtype(given)
        name = model_name(settings, split.model)
        named: Sequence[str | None] = split.worker or [settings.pick(None, ADDRESS_VARIABLE, None)]
        addresses = [parse_address(one) for one in named if one is not None]
        check_pipeline(advanced.pipeline, self._mode, len(addresses) or 1)
        self._shield = _shield_of(advanced, self._mode)
        of_worker = dtype
        if self._shield is not None:
            of_worker = self._shield.dtype_of_workers(dtype)
            self._shield.check_wire(split.wire_dtype)
        self._advanced = advanced
        self._stack = stack
        self._own: WorkerProcess | None = None
        if not addresses:  # started first, so that both processes import and load at the same time
            device = settings.pick(split.device, DEVICE_VARIABLE, "cpu")
            arguments = ["--model", name, "--dtype", of_worker, "--device", device, *_worker_arguments(split, advanced)]
            own = WorkerProcess(arguments, verbose=verbose, computes_alone=self._mode.worker_keeps_kv)
            self._own = stack.enter_context(own)
            addresses = [self._own.address]
        else:
            if split.device is not None:
                where = " and ".join(addresses)
                notice(f"--device {split.device} has no effect: the worker at {where} runs where it was started")
            for address in addresses:
                _tell_if_nothing_listens(address, advanced.connect_timeout_s)
        self._addresses = addresses
        limit_threads(advanced.threads)
        from ..boundary.compute import parse_dtype

        self._dtype = parse_dtype(dtype)
        self._wire = split.wire_dtype
        self.checkpoint = open_model(name, advanced.seed if advanced.random_weights else None)
        self.tokenizer = self.checkpoint.tokenizer()

    @property
    def positions(self) -> int:
        """The most tokens of a text, its answer included."""
        positions: int = self.checkpoint.config.max_position_embeddings
        return positions

    def check_prompt(self, ids: torch.Tensor) -> None:
        """Refuse a prompt that the model can't take, or that leaves no position for an answer.

        Raises:
            LlamaSplitError: it is empty, has tokens that the model does not know, or is too long.
        """
        tokens = ids.shape[1]
        if tokens == 0:
            raise LlamaSplitError("the prompt is empty: pass some text")
        least, most, vocabulary = int(ids.min()), int(ids.max()), self.checkpoint.geometry.vocab
        if least < 0 or most >= vocabulary:
            raise LlamaSplitError(
                f"the tokenizer returns token {least if least < 0 else most}, and the model has {vocabulary}: its "
                "files belong to two models"
            )
        if tokens >= self.positions:
            raise LlamaSplitError(
                f"the prompt has {tokens} tokens; the model has {self.positions} positions, one of them for an answer: "
                f"shorten the prompt by {tokens - self.positions + 1} tokens"
            )

    def connect(self) -> SplitLlamaForCausalLM:
        """Wait for the worker and load this side's weights.

        Raises:
            LlamaSplitError: the worker did not start, or serves another model.
            shmtransport.TransportError: no worker answers, or shared memory is short.
        """
        from ..trusted.model import SplitLlamaForCausalLM

        if self._own is not None:
            with notices.status("the worker is loading its weights"):
                self._own.wait_until_ready()
        with progress_bar("loading the trusted part") as progress:
            llama = self._stack.enter_context(
                SplitLlamaForCausalLM.from_pretrained(
                    self.checkpoint,
                    worker=self._addresses,
                    mode=self._mode,
                    dtype=self._dtype,
                    wire_dtype=self._wire,
                    arena_bytes=self._advanced.arena_bytes,
                    connect_timeout_s=self._advanced.connect_timeout_s,
                    channel=self._channel,
                    pipeline=self._advanced.pipeline,
                    shield=self._shield,
                    reconnect=self._advanced.reconnect,
                    revive=_nothing if self._own is None else self._own.revive,
                    progress=progress,
                )
            )
        settings = llama.generation_config
        if names := overruled(settings):
            notice(f"the model's generation settings {', '.join(names)} have no effect on the command line")
        llama.generation_config = taken_over(settings)
        return llama


def _tell_if_nothing_listens(address: str, timeout_s: float) -> None:
    """Say at once that nothing listens at a worker's address, if it is waited for noticeably long.

    Raises:
        shmtransport.AddressError: the address is malformed, or not on this machine.
    """
    check_connect(address)
    reason = absence(address)
    if reason is not None and timeout_s >= _SHORT_WAIT_S:
        notice(f"no worker listens at {address} ({reason}); waiting up to {timeout_s:g} s for one to start")


def _shield_of(advanced: AdvancedOptions, mode: Mode) -> Shield | None:
    """The shield that was chosen, which torch is needed for; None without one.

    Raises:
        LlamaSplitError: there is no such shield, it can't be used in this mode, or has no use for masks.
    """
    if advanced.masks is not None and advanced.shield != "otp":
        raise LlamaSplitError(f"--masks {advanced.masks} would have no effect: pass --shield otp")
    if advanced.shield == NO_SHIELD:
        return None
    limit_threads(advanced.threads)  # before torch is imported
    from ..shields.named import shield_named
    from ..shields.otp import OtpShield

    return shield_named(advanced.shield if advanced.masks is None else OtpShield(advanced.masks), mode)


def _nothing() -> None:
    """Leave a worker that this command has not started alone."""


def _worker_arguments(split: SplitOptions, advanced: AdvancedOptions) -> list[str]:
    arguments = []
    if advanced.random_weights:
        arguments += ["--random-weights", "--seed", str(advanced.seed)]
    if split.mode == "op":
        arguments += ["--embedding"]
    if advanced.threads is not None:
        arguments += ["--threads", str(advanced.threads)]
    return arguments
