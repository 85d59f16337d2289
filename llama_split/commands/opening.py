"""From options to a split model that answers: a worker of our own if none was named, the model's files, the connection.

In two steps, so that a prompt can be checked while the worker loads.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ..errors import LlamaSplitError
from ..launcher import WorkerProcess
from ..settings import ADDRESS_VARIABLE, DEVICE_VARIABLE, DTYPE_VARIABLE, Settings, parse_address
from .console import log, notice, notices, progress_bar
from .decoding import overruled, taken_over
from .options import SplitOptions, limit_threads, model_name, open_model

if TYPE_CHECKING:
    import torch

    from ..trusted.model import SplitLlamaForCausalLM


class Opening:
    """A model's files and tokenizer, and on ``connect`` the split model; all of it ends with ``stack``.

    Raises:
        LlamaSplitError: an option can't be used, or there is no such model.
    """

    def __init__(self, options: SplitOptions, stack: contextlib.ExitStack) -> None:
        log(options.verbose)
        settings = Settings(report=notice)
        dtype = settings.pick(options.dtype, DTYPE_VARIABLE, "float32")
        name = model_name(settings, options.model)
        address = settings.pick(options.worker, ADDRESS_VARIABLE, None)
        self._options = options
        self._stack = stack
        self._own: WorkerProcess | None = None
        if address is None:  # started first, so that both processes import and load at the same time
            device = settings.pick(options.device, DEVICE_VARIABLE, "cpu")
            arguments = _worker_arguments(options, name, dtype, device)
            self._own = stack.enter_context(WorkerProcess(arguments, verbose=options.verbose))
            address = self._own.address
        elif options.device is not None:
            notice(f"--device {options.device} has no effect: the worker at {address} runs where it was started")
        limit_threads(options.threads)
        from ..config import check_pipeline, parse_channel, parse_dtype, parse_mode

        self._address = parse_address(address)
        self._mode = parse_mode(options.mode)
        check_pipeline(options.pipeline, self._mode)
        self._dtype = parse_dtype(dtype)
        self._wire = self._dtype if options.wire_dtype is None else parse_dtype(options.wire_dtype)
        self._channel = parse_channel(options.channel)
        self.checkpoint = open_model(name, options.seed if options.random_weights else None)
        self.tokenizer = self.checkpoint.tokenizer()

    @property
    def positions(self) -> int:
        """How many tokens a text may have, the answer's included."""
        positions: int = self.checkpoint.config.max_position_embeddings
        return positions

    def check_prompt(self, ids: torch.Tensor) -> None:
        """Refuse a prompt that the model can't take, or after which there is no position left for an answer.

        Raises:
            LlamaSplitError: it is empty, has tokens that are none of the model's, or is too long.
        """
        tokens = ids.shape[1]
        if tokens == 0:
            raise LlamaSplitError("the prompt is empty: pass some text")
        least, most, vocabulary = int(ids.min()), int(ids.max()), self.checkpoint.geometry.vocab
        if least < 0 or most >= vocabulary:
            raise LlamaSplitError(
                f"the tokenizer gives token {least if least < 0 else most}, and the model has {vocabulary}: its files "
                "are those of two models"
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
                    worker=self._address,
                    mode=self._mode,
                    dtype=self._dtype,
                    wire_dtype=self._wire,
                    arena_bytes=self._options.arena_bytes,
                    connect_timeout_s=self._options.connect_timeout_s,
                    channel=self._channel,
                    pipeline=self._options.pipeline,
                    reconnect=self._options.reconnect,
                    revive=_nothing if self._own is None else self._own.revive,
                    progress=progress,
                )
            )
        settings = llama.generation_config
        if names := overruled(settings):
            notice(f"the model's generation settings {', '.join(names)} have no effect on the command line")
        llama.generation_config = taken_over(settings)
        return llama


def _nothing() -> None:
    """A worker that is not ours is started again by whoever started it."""


def _worker_arguments(options: SplitOptions, name: str, dtype: str, device: str) -> list[str]:
    arguments = ["--model", name, "--dtype", dtype, "--device", device]
    if options.random_weights:
        arguments += ["--random-weights", "--seed", str(options.seed)]
    if options.mode == "op":
        arguments += ["--embedding"]
    if options.threads is not None:
        arguments += ["--threads", str(options.threads)]
    return arguments
