"""Runs one model in a fresh process: ``python -m bench.engine.job JOB`` prints an ``Outcome`` as JSON.

The model is transformers' unsplit one, or a split one with a fresh worker process. Both get the same weights, prompts
and number of threads. What is timed is ``forward`` (a prompt, with the logits of one token) and the intervals between
the tokens of ``generate``.
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
    """What one process runs; ``prompts`` are lengths in tokens.

    Only the worker spins for ``spin_us``: the trusted side would spin on a core that the worker computes on. ``mode``
    is that of a split, or ``UNSPLIT`` with OpenMP's default threads, which spin while they wait, or
    ``UNSPLIT_PASSIVE`` with passive ones, as both processes of a split have them. Passive threads are faster on a busy
    machine. The worker, or the unsplit model, computes on ``device``.
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
    device: str = "cpu"


class Prefill(msgspec.Struct, frozen=True):
    """A prompt of one length: seconds of each forward, and what crossed between the processes in one."""

    tokens: int
    seconds: list[float]
    calls: int
    sent_bytes: int
    received_bytes: int


class Outcome(msgspec.Struct, frozen=True):
    """What one process measured; CPU seconds are those of decoding, ``token_ids`` the generated tokens."""

    prefills: list[Prefill]
    intervals: list[float]
    decode_calls: float
    decode_bytes: float
    token_ids: list[int]
    client_cpu_s: float
    worker_cpu_s: float


class _Clock:
    """A streamer that records when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def main() -> None:
    """Run the job that the command line describes."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    if job.mode != UNSPLIT:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    with contextlib.ExitStack() as stack:
        model, worker_pid = _model(job, stack)
        sys.stdout.buffer.write(msgspec.json.encode(_measure(job, model, worker_pid)))


def _model(job: Job, stack: contextlib.ExitStack) -> tuple[LlamaForCausalLM, int | None]:
    from llama_split.boundary.operations import Mode
    from llama_split.placement.local import WorkerProcess

    own: WorkerProcess | None = None
    if job.mode not in (UNSPLIT, UNSPLIT_PASSIVE):
        # Before the heavy imports, so that both processes load at the same time.
        options = [
            "--dtype",
            job.dtype,
            "--threads",
            str(job.threads),
            "--spin-us",
            str(job.spin_us),
            "--device",
            job.device,
            *model_options(job.model),
        ]
        mode = Mode(job.mode)
        options += ["--embedding"] if mode is Mode.OP else []
        own = stack.enter_context(WorkerProcess(options, computes_alone=mode.worker_keeps_kv))
    checkpoint = checkpoint_of(job.model)
    if own is None:
        return unsplit(checkpoint, job.dtype).to(job.device), None
    from llama_split import SplitLlamaForCausalLM
    from llama_split.boundary.choices import parse_channel

    own.wait_until_ready()
    split = SplitLlamaForCausalLM.from_pretrained(
        checkpoint,
        worker=own.address,
        mode=job.mode,
        dtype=job.dtype,
        channel=parse_channel(job.channel),
    )
    stack.enter_context(split)
    return split, split.workers[0].client.server_pid


def model_options(model: str) -> list[str]:
    """A worker's options for a model: the demo's, or a shape with random weights."""
    from llama_split.checkpoint.demo import demo_model

    return ["--model", str(demo_model())] if model == DEMO else ["--model", model, "--random-weights"]


def checkpoint_of(model: str) -> Checkpoint:
    """The same model's files."""
    from llama_split.checkpoint import open_checkpoint
    from llama_split.checkpoint.demo import demo_model
    from llama_split.checkpoint.synthetic import RandomCheckpoint

    return open_checkpoint(str(demo_model())) if model == DEMO else RandomCheckpoint(model)


def unsplit(checkpoint: Checkpoint, dtype_name: str) -> LlamaForCausalLM:
    """Transformers' own model with the checkpoint's weights."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from llama_split.boundary.compute import parse_dtype

    dtype = parse_dtype(dtype_name)
    checkpoint.config.dtype = dtype
    with torch.device("meta"):
        model = LlamaForCausalLM(checkpoint.config)
    weights = checkpoint.load(checkpoint.names, dtype, torch.device("cpu"))
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(checkpoint.config)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SystemExit("the checkpoint lacks weights of the unsplit model")
    model.lm_head.register_forward_pre_hook(_contiguous)
    return model.requires_grad_(requires_grad=False).eval()


def _contiguous(_head: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """The last position's hidden state in contiguous memory.

    With the strides of a slice, torch's matmul first copies the whole matrix, 1.8 s for Llama-3.2-1B in bfloat16. A
    comparison with that would flatter the split.
    """
    import torch

    return (arguments[0].clone(memory_format=torch.contiguous_format),)


def _measure(job: Job, model: LlamaForCausalLM, worker_pid: int | None) -> Outcome:
    import torch

    torch.set_num_threads(job.threads)
    with torch.inference_mode():
        prefills = [_prefill(model, tokens, job.repeats) for tokens in job.prompts]
        _generate(model, job.prompts[0], 8)  # warm-up
        counted = _counter(model)
        cpu = time.process_time(), _cpu_seconds(worker_pid)
        clock, ids = _generate(model, job.prompts[0], job.new_tokens)
        cpu = time.process_time() - cpu[0], _cpu_seconds(worker_pid) - cpu[1]
        calls, sent, received = counted()
    # The first time is the prompt's, the second that of the first token, which the prompt's forward gave.
    intervals = [later - earlier for earlier, later in zip(clock.times[1:], clock.times[2:], strict=False)]
    prompt = prefills[0]
    steps = job.new_tokens - 1
    crossed = sent + received - prompt.sent_bytes - prompt.received_bytes
    return Outcome(prefills, intervals, (calls - prompt.calls) / steps, crossed / steps, ids, *cpu)


def prompt_for(model: LlamaForCausalLM, tokens: int, seed: int = 5) -> torch.Tensor:
    """Random token ids [1, tokens], where the model is."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, model.config.vocab_size - 100, (1, tokens), generator=generator).to(model.device)


def _prefill(model: LlamaForCausalLM, tokens: int, repeats: int) -> Prefill:
    ids = prompt_for(model, tokens)
    seconds = []
    counted = _counter(model)
    crossed = (0, 0, 0)
    for _ in range(repeats + 1):
        started = time.perf_counter()
        output = model(ids, use_cache=True, logits_to_keep=1)
        output.logits.cpu()  # which waits for a GPU
        seconds.append(time.perf_counter() - started)
        del output
        if len(seconds) == 1:  # a later forward also ends the session of the previous one
            crossed = counted()
    return Prefill(tokens, seconds[1:], *crossed)  # the first was the warm-up


def _generate(model: LlamaForCausalLM, tokens: int, new: int) -> tuple[_Clock, list[int]]:
    import torch

    ids, clock = prompt_for(model, tokens), _Clock()
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
    """A function that returns calls, bytes sent and bytes received since now; zeros for the unsplit model."""
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
    """The CPU time of another process so far."""
    if pid is None:
        return 0.0
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
