"""What a shield does: ``verify`` finds every wrong result of a worker, before anything computed from it is shown."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llama_split import SplitLlamaForCausalLM
from llama_split.boundary.operations import DOWN, GATE_UP, LINEARS, LM_HEAD, MIX, OUT_PROJ, QKV, SCORES, Mode, Operation
from llama_split.checkpoint import Checkpoint, open_checkpoint
from llama_split.errors import LlamaSplitError, WorkerMismatch, WorkerTampered
from llama_split.model.program import WorkerOp
from llama_split.shields import named
from llama_split.shields.base import Covered, Shield
from llama_split.shields.put_off import PutOff
from llama_split.shields.verify import VerifyShield
from llama_split.worker.weights import Weights
from tests.support.llamas import VARIANTS, Small, Worker, worker_in_thread
from tests.support.prompts import prompt

DTYPES = ["float32", "bfloat16", "float16"]
LINEAR_MODES = [Mode.OP, Mode.FUSED]
Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def biased(save_small: Callable[..., Small]) -> Small:
    """A model with biases, whose output matrix is the embedding."""
    return save_small(5, **VARIANTS["biased"], tie_word_embeddings=True)


def split_of(small: Small, worker: Worker, **options: Any) -> SplitLlamaForCausalLM:
    """The split model with ``verify``, unless the options name another shield."""
    return SplitLlamaForCausalLM.from_pretrained(small.path, worker=worker.address, **{"shield": "verify", **options})


class Tampering:
    """Changes what a worker answers to one operation, from its ``begin``-th call on."""

    def __init__(self, worker: Worker, operation: Operation, change: Change, begin: int = 0) -> None:
        handlers = worker.server._handlers.by_name
        self._honest = handlers[operation.name]
        self._change = change
        self._left = begin
        handlers[operation.name] = self

    @torch.inference_mode()
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        result = self._honest(*arguments, **keywords)
        self._left -= 1
        return result if self._left >= 0 else self._change(result)


@pytest.fixture
def worker(biased: Small) -> Iterator[Worker]:
    with worker_in_thread(biased.path) as worker:
        yield worker


def greedy(model: Any, ids: torch.Tensor, new: int = 12, **options: Any) -> list[list[int]]:
    tokens: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return tokens.tolist()


@pytest.mark.parametrize("mode", LINEAR_MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_honest_worker_is_never_suspected(
    save_small: Callable[..., Small], variant: str, dtype: str, mode: Mode
) -> None:
    """Prompts of one token and of hundreds, batches and decoding, in every dtype: the same tokens, and no alarm."""
    small = save_small(7, **VARIANTS[variant])
    with worker_in_thread(small.path, getattr(torch, dtype)) as worker:
        options = {"mode": mode, "dtype": dtype}
        with split_of(small, worker, **options) as shielded, split_of(small, worker, **options, shield=None) as plain:
            for ids in (prompt(1), prompt(300), prompt(5, 3), prompt(40, 2)):
                assert greedy(shielded, ids) == greedy(plain, ids)


@pytest.mark.parametrize("wire_dtype", DTYPES)
def test_what_crosses_in_another_dtype_is_verified_too(biased: Small, worker: Worker, wire_dtype: str) -> None:
    """Arguments are rounded on their way, and results are; neither is taken for tampering, a wrong result is."""
    with split_of(biased, worker, wire_dtype=wire_dtype) as split:
        greedy(split, prompt(40))
        Tampering(worker, DOWN, lambda right: right * 1.25)
        with pytest.raises(WorkerTampered, match="down of layer 0"):
            greedy(split, prompt(40))


@pytest.mark.parametrize("operation", [QKV, SCORES, MIX, OUT_PROJ, GATE_UP, DOWN, LM_HEAD], ids=lambda one: one.name)
def test_one_wrong_number_is_found(biased: Small, worker: Worker, operation: Operation) -> None:
    """Of any operation that is linear, in few rows and many; the error names the operation and the layer."""

    def change(right: torch.Tensor) -> torch.Tensor:
        right.view(-1)[right.numel() // 2] += 0.5 * right.abs().max()
        return right

    with split_of(biased, worker, mode="op") as split:
        greedy(split, prompt(40), 2)
        Tampering(worker, operation, change)
        where = f"{operation.name} of layer 0" if operation.per_layer else operation.name
        for tokens in (1, 40):
            with pytest.raises(WorkerTampered, match=f"wrong result of {where}: it is off by .* times"):
                split(prompt(tokens))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_result_that_is_no_number_is_found(biased: Small, worker: Worker, value: float) -> None:
    """NaN and infinity compare with nothing, and pass for nothing."""
    Tampering(worker, GATE_UP, lambda right: right.index_fill(-1, torch.tensor([3]), value))
    with split_of(biased, worker) as split, pytest.raises(WorkerTampered, match="gate_up of layer 0"):
        split(prompt(30))


def test_a_worker_with_other_weights_is_found(biased: Small, worker: Worker) -> None:
    """One changed number of a matrix, which the fingerprint may miss, shows in the results."""
    with split_of(biased, worker) as split:
        worker.service._weights._linears[2][DOWN].weight[7, 5] += 1.0
        with pytest.raises(WorkerTampered, match="down of layer 2"):
            split(prompt(30))


def test_arguments_are_out_of_the_workers_reach(biased: Small, worker: Worker) -> None:
    """A worker that changes an argument in the arena, and computes rightly with that, is found."""
    honest = worker.server._handlers.by_name[OUT_PROJ.name]
    worker.server._handlers.by_name[OUT_PROJ.name] = lambda argument, **keywords: honest(argument.mul_(2), **keywords)
    with split_of(biased, worker) as split, pytest.raises(WorkerTampered, match="o of layer 0"):
        split(prompt(30))


def test_results_are_out_of_the_workers_reach(biased: Small) -> None:
    """What the model goes on with is a copy, so that a result can't change after it was checked."""
    shield = VerifyShield()
    checkpoint = open_checkpoint(str(biased.path))
    shield.load(checkpoint, torch.float32, torch.float32)
    for rows in (2, 40):
        op = WorkerOp(DOWN, 1, (torch.randn(1, rows, checkpoint.geometry.intermediate),))
        told = right_result(checkpoint, op)
        own = shield.cover(op).uncover(told)
        told.zero_()
        shield.settle()
        assert own.abs().max() > 0.1


@pytest.mark.parametrize("length", [3, 40])
def test_nothing_that_was_computed_from_a_wrong_result_is_shown(biased: Small, worker: Worker, length: int) -> None:
    """Tokens are streamed up to the step in which the worker begins to lie, and none after."""

    class Streamer:
        def __init__(self) -> None:
            self.shown: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.shown += value.flatten().tolist()

        def end(self) -> None: ...

    with split_of(biased, worker) as split:
        (expected,) = greedy(split, prompt(length))
        streamer = Streamer()
        Tampering(worker, QKV, lambda right: -right, begin=3 * 6)  # of three layers, from the seventh forward on
        with pytest.raises(WorkerTampered):
            greedy(split, prompt(length), streamer=streamer)
        assert streamer.shown == expected[: length + 6]


def test_the_next_generation_is_not_suspected_for_the_last(biased: Small, worker: Worker) -> None:
    """An alarm ends its own forward; what was put off in it is forgotten."""
    honest = worker.server._handlers.by_name[QKV.name]
    with split_of(biased, worker) as split:
        expected = greedy(split, prompt(3))
        Tampering(worker, QKV, lambda right: -right)
        with pytest.raises(WorkerTampered):
            greedy(split, prompt(3))
        worker.server._handlers.by_name[QKV.name] = honest
        assert greedy(split, prompt(3)) == expected


def test_threads_do_not_check_for_each_other(biased: Small, worker: Worker) -> None:
    """Forwards of several threads at once: each finds its own wrong result, and no other's."""
    with split_of(biased, worker) as split:
        expected = greedy(split, prompt(5))
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(greedy(split, prompt(5)))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == [expected] * 4


def test_chunks_in_flight_are_verified(biased: Small, worker: Worker) -> None:
    """A pipeline, small arenas and a batch in one call: honest results pass, and wrong ones don't."""
    with split_of(biased, worker, pipeline=3, arena_bytes=64 << 10) as split:
        whole = split(prompt(200)).logits
        torch.testing.assert_close(whole, biased.unsplit(prompt(200)).logits, rtol=1e-3, atol=1e-3)
        Tampering(worker, DOWN, lambda right: right * 1.1, begin=4)
        with pytest.raises(WorkerTampered, match="down of layer"):
            split(prompt(200))


@pytest.mark.parametrize("mode", [Mode.LAYER, Mode.STACK])
def test_modes_whose_worker_attends_are_refused(biased: Small, worker: Worker, mode: Mode) -> None:
    """Attention is not linear; the error reports it, and which modes are possible."""
    with pytest.raises(LlamaSplitError, match=r"not linear: use op or fused"):
        split_of(biased, worker, mode=mode)


def test_the_report_tells_what_was_verified_and_what_was_not(biased: Small, worker: Worker) -> None:
    """By operation, since it was last asked for; the embedding's look-up can't be verified."""
    with split_of(biased, worker, mode="op", wire_dtype="float32") as split:
        split(prompt(7), logits_to_keep=2)
        report = split.shield_report()
        assert report is not None
        linear = {one.name: "verified" for one in (*LINEARS, SCORES, MIX)}
        assert report.treated == {**linear, "embed": "neither"}
        assert (report.rows["down"], report.rows["lm_head"], report.rows["embed"]) == (3 * 7, 2, 7)
        assert "1.6/r" in report.bound
        split(prompt(1))
        assert split.shield_report().rows["down"] == 3  # type: ignore[union-attr]
    with split_of(biased, worker, shield="none") as plain:
        assert plain.shield_report() is None


def right_result(checkpoint: Checkpoint, op: WorkerOp) -> torch.Tensor:
    """What an honest worker returns for one operation."""
    weights = Weights(checkpoint, torch.float32, torch.device("cpu"))
    (argument,) = op.arguments
    linear = weights.linear(op.operation, op.layer)
    return linear(argument, argument.new_empty((*argument.shape[:-1], linear.weight.shape[0])))


@pytest.mark.parametrize("repetitions", [1, 2])
@pytest.mark.parametrize("ratio", [10.0, 100.0])
def test_how_often_an_error_passes_is_within_the_bound(biased: Small, ratio: float, repetitions: int) -> None:
    """Of errors r times the threshold, in random directions, at most 1.6/r pass, and its square for two secrets."""
    checkpoint = open_checkpoint(str(biased.path))
    shield = VerifyShield(repetitions)
    shield.load(checkpoint, torch.float32, torch.float32)
    op = WorkerOp(DOWN, 1, (torch.randn(1, 20, checkpoint.geometry.intermediate),))
    right = right_result(checkpoint, op)
    _, threshold = shield._compare(op.arguments[0][0], right[0], shield._secrets[DOWN, 1])
    passed, tried = 0, 600
    for number in range(tried):
        wrong = torch.randn(right.shape[-1])
        row = number % right.shape[1]
        told = right.clone()
        told[0, row] += wrong * (ratio * threshold[row] / torch.linalg.vector_norm(wrong))
        shield.cover(op).uncover(told)
        with contextlib.suppress(WorkerTampered):
            shield.settle()
            passed += 1
    expected = (1.6 / ratio) ** repetitions
    assert passed / tried < expected + 4 * math.sqrt(expected / tried)


class Nothing(Shield):
    """A shield of another package."""

    name = "nothing"
    bound = "none"

    def load(self, *_arguments: Any) -> None: ...

    def cover(self, op: WorkerOp) -> Covered:
        self.count(op)
        return Covered(op, torch.Tensor.clone)

    def treatment(self, operation: str) -> str:
        return "neither"


class _EntryPoint:
    def __init__(self, name: str, made: object) -> None:
        self.name = name
        self._made = made

    def load(self) -> Callable[[], object]:
        return lambda: self._made


def test_other_packages_shields_are_found_by_name(
    biased: Small, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their entry points; an unknown name lists all, and what is no shield is refused."""
    entries = [_EntryPoint("nothing", Nothing()), _EntryPoint("wrong", 5)]

    class Entries(list[_EntryPoint]):
        names = frozenset({"nothing", "wrong"})

    monkeypatch.setattr(named, "entry_points", lambda group: Entries(entries if group == named.GROUP else []))
    with split_of(biased, worker, shield="nothing") as split:
        greedy(split, prompt(3))
        report = split.shield_report()
        assert report is not None
        assert set(report.treated.values()) == {"neither"}
    with pytest.raises(LlamaSplitError, match="no shield 'never'; there are: none, nothing, otp, verify, wrong"):
        split_of(biased, worker, shield="never")
    with pytest.raises(LlamaSplitError, match="of type int, which is no shield"):
        split_of(biased, worker, shield="wrong")


@pytest.mark.parametrize("rows", [1, 40])
def test_an_interrupt_during_a_check_puts_it_off_again(rows: int) -> None:
    """What was not looked at to the end is looked at when the forward is given up; after an alarm nothing is."""
    checked: list[int] = []
    interrupts = [KeyboardInterrupt]

    def check(product: int) -> None:
        if product == 2 and interrupts:
            raise interrupts.pop()
        checked.append(product)
        if product == 9:
            raise WorkerTampered("wrong")

    put_off = PutOff[int](check, lambda several: [check(one) for one in several] and None)
    for product in (1, 2, 3):
        put_off.add(product, product, rows)
    with pytest.raises(KeyboardInterrupt):
        put_off.settle()
    put_off.settle()
    assert sorted(set(checked)) == [1, 2, 3]
    checked.clear()
    for product in (8, 9, 7):
        put_off.add(product, product, rows)
    with pytest.raises(WorkerTampered):
        put_off.settle()
    checked.clear()
    put_off.settle()
    assert not checked


def test_a_shield_that_fails_after_a_failure_does_not_hide_it(biased: Small, worker: Worker) -> None:
    """What the forward raised is what its caller gets."""
    shield = Nothing()
    shield.give_up = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    worker.server._handlers.by_name[OUT_PROJ.name] = lambda *_arguments, **_keywords: None
    with split_of(biased, worker, shield=shield) as split, pytest.raises(WorkerMismatch, match="answered o with"):
        split(prompt(3))


def test_a_shield_is_loaded_for_one_model(biased: Small, worker: Worker) -> None:
    """Its secrets belong to that model's weights."""
    shield = VerifyShield()
    with split_of(biased, worker, shield=shield), pytest.raises(LlamaSplitError, match="belongs to one model"):
        split_of(biased, worker, shield=shield)
