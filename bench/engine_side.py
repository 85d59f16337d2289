"""One fresh process of the engine's benchmark: ``python -m bench.engine_side JOB`` runs a model, prints JSON.

The model is the unsplit one of transformers, or a split one with a fresh worker process of its own. Both get the
same weights, prompts and number of threads. Times are of ``forward`` (a prompt, with one token's logits) and of the
intervals between the tokens of ``generate``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

    from llama_split.checkpoint import Checkpoint

UNSPLIT = "unsplit"
UNSPLIT_PASSIVE = "unsplit, passive threads"
DEMO = "smollm2"


class Job(msgspec.Struct, frozen=True):
    """What one process is to run. ``prompts`` are lengths in tokens.

    ``spin_us`` is for the worker; the trusted side would look for the reply on a core that the worker computes on.
    ``mode`` is a split's name, or the unsplit model's with OpenMP's threads as they are by default, which spin while
    they wait, or passive ones, as the split's two processes have them. On a busy machine the latter is faster.
    """

    model: str
    dtype: str
    mode: str
    channel: str
    spin_us: float
    prompts: list[int]
    new_tokens: int
    repeats: int
    threads: int


class Prefill(msgspec.Struct, frozen=True):
    """One length of prompt: seconds of each forward, and what crossed in one of them."""

    tokens: int
    seconds: list[float]
    calls: int
    sent_bytes: int
    received_bytes: int


class Outcome(msgspec.Struct, frozen=True):
    """What one process has found. CPU seconds are of the decoding; ``token_ids`` are what was generated."""

    prefills: list[Prefill]
    intervals: list[float]
    decode_calls: float
    decode_bytes: float
    token_ids: list[int]
    client_cpu_s: float
    worker_cpu_s: float


class _Clock:
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def main() -> None:
    """Entry point."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    if job.mode != UNSPLIT:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    with contextlib.ExitStack() as stack:
        model, worker_pid = _model(job, stack)
        sys.stdout.buffer.write(msgspec.json.encode(_measure(job, model, worker_pid)))


def _model(job: Job, stack: contextlib.ExitStack) -> tuple[LlamaForCausalLM, int | None]:
    from llama_split.launcher import WorkerProcess

    own: WorkerProcess | None = None
    if job.mode not in (
        UNSPLIT,
        UNSPLIT_PASSIVE,
    ):  # started before anything heavy is imported, so that both load at once
        options = [
            "--dtype",
            job.dtype,
            "--threads",
            str(job.threads),
            "--spin-us",
            str(job.spin_us),
            *_model_options(job.model),
        ]
        own = stack.enter_context(WorkerProcess([*options, *(["--embedding"] if job.mode == "op" else [])]))
    checkpoint = _checkpoint(job.model)
    if own is None:
        return _unsplit(checkpoint, job.dtype), None
    from llama_split import SplitLlamaForCausalLM
    from llama_split.config import parse_channel

    own.wait_until_ready()
    split = SplitLlamaForCausalLM.from_pretrained(
        checkpoint,
        worker=own.address,
        mode=job.mode,
        dtype=job.dtype,
        channel=parse_channel(job.channel),
    )
    stack.enter_context(split)
    return split, split.link.client.server_pid


def _model_options(model: str) -> list[str]:
    from llama_split.settings import demo_model

    return ["--model", str(demo_model())] if model == DEMO else ["--model", model, "--random-weights"]


def _checkpoint(model: str) -> Checkpoint:
    from llama_split.checkpoint import open_checkpoint
    from llama_split.settings import demo_model
    from llama_split.synthetic import RandomCheckpoint

    return open_checkpoint(str(demo_model())) if model == DEMO else RandomCheckpoint(model)


def _unsplit(checkpoint: Checkpoint, dtype_name: str) -> LlamaForCausalLM:
    """Transformers' own model with the checkpoint's weights."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from llama_split.config import parse_dtype

    dtype = parse_dtype(dtype_name)
    checkpoint.config.dtype = dtype
    with torch.device("meta"):
        model = LlamaForCausalLM(checkpoint.config)
    weights = checkpoint.load(checkpoint.names, dtype, torch.device("cpu"))
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(checkpoint.config)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SystemExit("the unsplit model lacks weights")
    model.lm_head.register_forward_pre_hook(_own_strides)
    return model.requires_grad_(requires_grad=False).eval()


def _own_strides(_head: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """The last position's hidden state, with the strides of a tensor of its own.

    With those of a slice of the prompt's, torch's matmul copies the whole matrix first: 1.8 s for Llama-3.2-1B in
    bfloat16, which the split would be compared with.
    """
    import torch

    return (arguments[0].clone(memory_format=torch.contiguous_format),)


def _measure(job: Job, model: LlamaForCausalLM, worker_pid: int | None) -> Outcome:
    import torch

    torch.set_num_threads(job.threads)
    with torch.inference_mode():
        prefills = [_prefill(model, tokens, job.repeats) for tokens in job.prompts]
        _generate(model, job.prompts[0], 8)  # warm
        counted = _counter(model)
        cpu = time.process_time(), _cpu_seconds(worker_pid)
        clock, ids = _generate(model, job.prompts[0], job.new_tokens)
        cpu = time.process_time() - cpu[0], _cpu_seconds(worker_pid) - cpu[1]
        calls, sent, received = counted()
    # The first time is the prompt's, the second one the first token's, which the prompt's forward gave.
    intervals = [later - earlier for earlier, later in zip(clock.times[1:], clock.times[2:], strict=False)]
    prompt = prefills[0]
    steps = job.new_tokens - 1
    crossed = sent + received - prompt.sent_bytes - prompt.received_bytes
    return Outcome(prefills, intervals, (calls - prompt.calls) / steps, crossed / steps, ids, *cpu)


def _prompt(model: LlamaForCausalLM, tokens: int) -> torch.Tensor:
    import torch

    return torch.randint(100, model.config.vocab_size - 100, (1, tokens), generator=torch.Generator().manual_seed(5))


def _prefill(model: LlamaForCausalLM, tokens: int, repeats: int) -> Prefill:
    ids = _prompt(model, tokens)
    seconds = []
    counted = _counter(model)
    crossed = (0, 0, 0)
    for _ in range(repeats + 1):
        started = time.perf_counter()
        output = model(ids, use_cache=True, logits_to_keep=1)
        seconds.append(time.perf_counter() - started)
        del output
        if len(seconds) == 1:  # later ones also end the session of the one before
            crossed = counted()
    return Prefill(tokens, seconds[1:], *crossed)  # the first one is the warm-up


def _generate(model: LlamaForCausalLM, tokens: int, new: int) -> tuple[_Clock, list[int]]:
    import torch

    ids, clock = _prompt(model, tokens), _Clock()
    output: Any = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
    )
    return clock, output[0, tokens:].tolist()


def _counter(model: LlamaForCausalLM) -> Callable[[], tuple[int, int, int]]:
    """A function that tells calls, bytes sent and bytes received since now; zeros for the unsplit model."""
    statistics = getattr(model, "statistics", None)
    if statistics is None:
        return lambda: (0, 0, 0)
    before = statistics()

    def since() -> tuple[int, int, int]:
        after = statistics()
        return (
            after.calls - before.calls,
            after.tensor_bytes_sent - before.tensor_bytes_sent,
            after.tensor_bytes_received - before.tensor_bytes_received,
        )

    return since


def _cpu_seconds(pid: int | None) -> float:
    """CPU time of another process."""
    if pid is None:
        return 0.0
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
