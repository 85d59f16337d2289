"""The shield ``otp``: what crosses tells the worker nothing, it can change nothing, and the model computes the same."""

from __future__ import annotations

import contextlib
import gc
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from llama_split import SplitLlamaForCausalLM
from llama_split.boundary.operations import LINEARS, LM_HEAD, OUT_PROJ, QKV, REVEALED_UNDER_MASKS, Mode, Operation
from llama_split.checkpoint import EMBEDDING, LAYER_NORMS, layer_name, open_checkpoint
from llama_split.checkpoint.demo import demo_model
from llama_split.errors import LlamaSplitError, MasksExhausted, MissingPackage, WorkerMismatch, WorkerTampered
from llama_split.shields.dealer import deal_file
from llama_split.shields.otp import OtpShield
from llama_split.shields.prime_field import PRIMES
from llama_split.shields.unsplit import quantise
from shmtransport import LocalProtocolError, RemoteError, Server
from tests.llama.test_continuous_batching import NEW_TOKENS, batched, prompts
from tests.llama.test_prompt_revealed import nearest
from tests.llama.test_shields import Tampering, greedy
from tests.support.hollow import hollow_handlers
from tests.support.llamas import VARIANTS, IntegerWorker, Small, integer_worker_in_thread, worker_in_thread
from tests.support.prompts import prompt

DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def biased(save_small: Callable[..., Small]) -> Small:
    """A model with biases, whose output matrix is the embedding."""
    return save_small(5, **VARIANTS["biased"], tie_word_embeddings=True)


@pytest.fixture
def worker(biased: Small) -> Iterator[IntegerWorker]:
    with integer_worker_in_thread(biased.path) as worker:
        yield worker


def split_of(small: Small, worker: IntegerWorker, masks: Path | None = None, **options: Any) -> SplitLlamaForCausalLM:
    """The split model under masks from a file, or dealt by this process."""
    shield = OtpShield(masks, ahead=32)
    return SplitLlamaForCausalLM.from_pretrained(small.path, worker=worker.address, **{"shield": shield, **options})


class Recording:
    """Keeps what a worker is sent for one operation, by layer."""

    def __init__(self, worker: IntegerWorker, operation: Operation) -> None:
        handlers = worker.server._handlers.by_name
        self._honest = handlers[operation.name]
        self.sent: dict[int, list[torch.Tensor]] = {}
        handlers[operation.name] = self

    def __call__(self, argument: torch.Tensor, *, layer: int = 0) -> Any:
        self.sent.setdefault(layer, []).append(argument.clone())
        return self._honest(argument, layer=layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tokens_are_those_of_the_quantised_model_unsplit(
    save_small: Callable[..., Small], variant: str, dtype: str
) -> None:
    """Bit for bit the same products, so the same greedy tokens: prompts of any length, batches, decoding."""
    small = save_small(7, **VARIANTS[variant])
    checkpoint = open_checkpoint(str(small.path))
    unsplit = quantise(type(small.unsplit).from_pretrained(small.path, dtype=getattr(torch, dtype)), checkpoint).eval()
    with integer_worker_in_thread(small.path) as worker, split_of(small, worker, dtype=dtype) as split:
        for ids in (prompt(1), prompt(80), prompt(5, 3)):
            assert greedy(split, ids, 6) == greedy(unsplit, ids, 6)


def test_each_product_is_the_quantised_models_bit_for_bit(biased: Small, worker: IntegerWorker) -> None:
    """Of every operation and layer, in float32, biases included."""
    checkpoint = open_checkpoint(str(biased.path))
    unsplit = quantise(type(biased.unsplit).from_pretrained(biased.path), checkpoint).eval()
    with split_of(biased, worker) as split, torch.inference_mode():
        # Without rounding of attention in between: one layer's first product, and the logits of one hidden state.
        hidden = torch.randn(1, 9, checkpoint.geometry.hidden)
        assert torch.equal(split.lm_head(hidden), unsplit.lm_head(hidden))
        logits = split(prompt(30)).logits
        torch.testing.assert_close(logits, unsplit(prompt(30)).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("operation", LINEARS, ids=lambda one: one.name)
def test_the_smallest_change_of_one_number_is_found(biased: Small, worker: IntegerWorker, operation: Operation) -> None:
    """By one, by the top bit, by one of the test's primes, in decoding and in prompts: nothing is tolerated."""
    handlers = worker.server._handlers.by_name
    honest = handlers[operation.name]
    where = f"{operation.name} of layer 0" if operation.per_layer else operation.name
    with split_of(biased, worker) as split:
        for tokens, by in itertools.product((1, 40), (1, -(1 << 31), PRIMES[0])):

            def change(right: torch.Tensor, by: int = by) -> torch.Tensor:
                right.view(-1)[right.numel() // 2] += by  # modulo 2³²
                return right

            Tampering(worker, operation, change)  # type: ignore[arg-type]
            with pytest.raises(WorkerTampered, match=f"wrong result of {where}, where nothing is rounded"):
                split(prompt(tokens))
            handlers[operation.name] = honest
            split(prompt(tokens))


def test_a_worker_with_other_weights_is_found(biased: Small, worker: IntegerWorker) -> None:
    """One weight that differs by one step."""
    with split_of(biased, worker) as split:
        worker.weights.linear(QKV, 1).weight[7, 5] += 1
        with pytest.raises(WorkerTampered, match="qkv of layer 1"):
            split(prompt(30))


def byte_counts(tensors: list[torch.Tensor]) -> Any:
    return np.bincount(torch.cat([one.flatten() for one in tensors]).numpy().view(np.uint8), minlength=256)


def deviates(counts: Any) -> bool:
    """Whether bytes are not uniform, by a chi-squared test that fails once in 10⁹ runs."""
    expected = counts.sum() / 256
    return bool(((counts - expected) ** 2 / expected).sum() > 255 + 6.5 * (2 * 255) ** 0.5)


@pytest.mark.parametrize("operation", LINEARS, ids=lambda one: one.name)
def test_what_crosses_is_uniform_whatever_the_prompt(
    biased: Small, worker: IntegerWorker, operation: Operation, tmp_path: Path
) -> None:
    """Many runs; and with the very same masks, two prompts are sent as numbers that are distributed alike."""
    recording = Recording(worker, operation)
    with split_of(biased, worker) as split:
        for _ in range(8):
            split(prompt(40))
    crossed = [each for one in recording.sent.values() for each in one]
    assert not deviates(byte_counts(crossed))
    assert len({each.numpy().tobytes() for each in crossed}) == len(crossed)

    dealt, of_prompts = tmp_path / "dealt", []
    deal_file(open_checkpoint(str(biased.path)), dealt, 64, 64)
    for ids in (torch.full((1, 60), 3), prompt(60)):
        masks = Path(shutil.copy(dealt, tmp_path / "used"))
        recording.sent.clear()
        with split_of(biased, worker, masks) as split:
            split(ids)
        of_prompts.append(byte_counts([each for one in recording.sent.values() for each in one]))
    first, second = of_prompts
    assert not deviates(first)
    assert not deviates(second)
    assert ((first - second) ** 2 / (first + second)).sum() < 256 + 6.5 * (2 * 256) ** 0.5


def test_the_prompt_can_not_be_looked_up(serve: Callable[..., Server], address: str) -> None:
    """What gives 95 of 100 tokens of SmolLM2 away without masks gives none of them away with masks."""
    checkpoint, received = open_checkpoint(str(demo_model())), []
    handlers = hollow_handlers(checkpoint, torch.int8, lambda shape: torch.zeros(shape, dtype=torch.int32))
    answer = handlers[QKV.name]

    def record(argument: torch.Tensor, *, layer: int) -> Any:
        received.append(argument.clone())
        return answer(argument, layer=layer)

    serve(**{**handlers, QKV.name: record})
    ids_T = torch.randint(checkpoint.geometry.vocab, (64,), generator=torch.Generator().manual_seed(24))
    with (
        SplitLlamaForCausalLM.from_pretrained(
            checkpoint, worker=address, dtype="float32", shield=OtpShield(ahead=64)
        ) as split,
        pytest.raises(WorkerTampered),
    ):
        split(ids_T[None], logits_to_keep=1)
    norm = layer_name(0, LAYER_NORMS[0])
    weights = checkpoint.load([norm, EMBEDDING], torch.float32, torch.device("cpu"))
    seen = received[0][0].to(torch.float32) / weights[norm]
    assert (nearest(seen, weights[EMBEDDING]) == ids_T).float().mean() < 0.1


def test_a_lost_worker_costs_no_token_and_is_sent_nothing_new(
    biased: Small, tmp_path: Path, worker: IntegerWorker
) -> None:
    """The next worker is sent the same numbers for the call that was under way, with no second mask."""
    recording = Recording(worker, QKV)
    with split_of(biased, worker) as split:
        expected = greedy(split, prompt(5))
        recording.sent.clear()
        client = split.workers[0].client
        submit, lost = client.submit, []

        def losing(method: str, *arguments: Any, **keywords: Any) -> Any:
            if method == QKV.name and keywords["layer"] == 1 and len(lost) < 2:
                lost.append(arguments[0].clone())
                client.close()
            return submit(method, *arguments, **keywords)

        client.submit = losing  # type: ignore[method-assign]
        assert greedy(split, prompt(5)) == expected
        assert torch.equal(lost[0], recording.sent[1][0])


def test_masks_of_a_file_are_used_up_and_nothing_goes_on_without(
    biased: Small, worker: IntegerWorker, tmp_path: Path
) -> None:
    """The generation ends with an error before anything unmasked is sent; a new file goes on."""
    checkpoint, recording = open_checkpoint(str(biased.path)), Recording(worker, QKV)
    for name in ("first", "second"):
        deal_file(checkpoint, tmp_path / name, 32, 32)
    with split_of(biased, worker, tmp_path / "first") as split:
        (expected,) = greedy(split, prompt(20), 6)
        with pytest.raises(MasksExhausted, match="20 masks for qkv are needed and 7 are left"):
            greedy(split, prompt(20), 6)
    assert sum(one.shape[1] for one in recording.sent[0]) == 25
    with split_of(biased, worker, tmp_path / "second") as split:
        assert greedy(split, prompt(20), 6) == [expected]


@pytest.mark.parametrize("options", [{"pipeline": 3}, {"arena_bytes": 64 << 10}, {"channel": "doorbell"}], ids=str)
def test_chunks_and_channels_change_nothing(biased: Small, worker: IntegerWorker, options: dict[str, Any]) -> None:
    """A prompt in chunks, arenas that are small, either channel: the same tokens."""
    with split_of(biased, worker) as split, split_of(biased, worker, **options) as other:
        assert greedy(other, prompt(200)) == greedy(split, prompt(200))


def test_several_workers_share_the_layers(biased: Small, worker: IntegerWorker) -> None:
    """Each is sent masked numbers only, and holds its own matrices."""
    with (
        integer_worker_in_thread(biased.path, range(1)) as first,
        integer_worker_in_thread(biased.path, range(1, 3)) as second,
        split_of(biased, worker) as whole,
        SplitLlamaForCausalLM.from_pretrained(
            biased.path, worker=[first.address, second.address], shield=OtpShield(ahead=32)
        ) as shared,
    ):
        assert greedy(shared, prompt(9)) == greedy(whole, prompt(9))
        with pytest.raises(RemoteError, match="layer 2 is asked for; this worker holds layers 0"):
            shared.workers[0].client.call("qkv", torch.zeros((1, 1, 64), dtype=torch.int32), layer=2)
        with pytest.raises(RemoteError, match="the output matrix is asked for"):
            shared.workers[0].client.call("lm_head", torch.zeros((1, 1, 64), dtype=torch.int32))


@pytest.mark.parametrize("mode", [Mode.OP, Mode.LAYER, Mode.STACK])
def test_modes_in_which_more_than_products_crosses_are_refused(
    biased: Small, worker: IntegerWorker, mode: Mode
) -> None:
    """In op the worker would see token ids and attention."""
    with pytest.raises(LlamaSplitError, match=f"otp can't be used in mode {mode.value}.*: use fused"):
        split_of(biased, worker, mode=mode)


def test_both_sides_must_be_meant_for_whole_numbers(biased: Small, worker: IntegerWorker) -> None:
    """A worker in floating point, a trusted side without the shield, a wire dtype: refused with the remedy."""
    with (
        worker_in_thread(biased.path) as floating,
        pytest.raises(
            WorkerMismatch, match="computes in float32, and this side needs int8: start it with --dtype int8"
        ),
    ):
        SplitLlamaForCausalLM.from_pretrained(biased.path, worker=floating.address, shield="otp")
    with pytest.raises(WorkerMismatch, match="computes in int8, and this side needs float32"):
        SplitLlamaForCausalLM.from_pretrained(biased.path, worker=worker.address)
    with pytest.raises(LlamaSplitError, match="sends int32, so a wire dtype has no effect"):
        split_of(biased, worker, wire_dtype="float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int16, torch.uint8])
def test_a_worker_for_whole_numbers_takes_no_others(biased: Small, worker: IntegerWorker, dtype: torch.dtype) -> None:
    """A client that sends something else gets an error in words, and the worker goes on."""
    with split_of(biased, worker) as split:
        with pytest.raises(RemoteError, match="qkv takes tensors of one dtype, int32"):
            split.workers[0].client.call("qkv", torch.zeros((1, 1, 64), dtype=dtype), layer=0)
        for unknown in ("layer", "stack", "embed", "scores"):
            with pytest.raises(LocalProtocolError, match="no method"):
                split.workers[0].client.call(unknown, torch.zeros((1, 1, 64), dtype=torch.int32))
        greedy(split, prompt(3), 2)


def test_the_report_tells_what_holds(biased: Small, worker: IntegerWorker) -> None:
    """Everything that crossed was masked and verified, and with which bound."""
    with split_of(biased, worker) as split:
        split(prompt(7), logits_to_keep=1)
        report = split.shield_report()
        assert report is not None
        assert report.treated == {one.name: "masked and verified" for one in LINEARS}
        assert (report.rows["qkv"], report.rows["lm_head"]) == (3 * 7, 1)
        assert "no mask is used twice" in report.bound
        assert "2⁻³⁹" in report.bound
        assert split.revealed == REVEALED_UNDER_MASKS


def test_a_closed_model_gives_its_masks_back(biased: Small, worker: IntegerWorker, tmp_path: Path) -> None:
    """The next one can use the rest of the file, and one that failed to connect leaves it as well."""
    dealt = tmp_path / "masks"
    deal_file(open_checkpoint(str(biased.path)), dealt, 64, 64)
    with split_of(biased, worker, dealt) as split:
        with pytest.raises(LlamaSplitError, match="in use by another process"):
            split_of(biased, worker, dealt)
        split(prompt(10))
    with split_of(biased, worker, dealt) as split:
        split(prompt(10))


class Failing:
    """Fails one operation of a worker after it has changed the results of another."""

    def __init__(self, worker: Any, tampered: Operation, failed: Operation) -> None:
        Tampering(worker, tampered, lambda right: right + 1)
        worker.server._handlers.by_name[failed.name] = self

    def __call__(self, *_arguments: Any, **_keywords: Any) -> Any:
        raise ValueError("deliberate")


@pytest.mark.parametrize("shield", ["otp", "verify"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_forward_that_fails_is_checked_too(biased: Small, worker: IntegerWorker, tokens: int, shield: str) -> None:
    """Else what was computed from wrong results could stay in a cache, and be shown by another thread."""
    with contextlib.ExitStack() as stack:
        if shield == "otp":
            served: Any = worker
            split = stack.enter_context(split_of(biased, worker))
        else:
            served = stack.enter_context(worker_in_thread(biased.path))
            model = SplitLlamaForCausalLM.from_pretrained(biased.path, worker=served.address, shield="verify")
            split = stack.enter_context(model)
        cache = DynamicCache()
        split(prompt(3), past_key_values=cache)
        Failing(served, QKV, LM_HEAD)
        with pytest.raises(WorkerTampered, match="qkv of layer 0"):
            split(prompt(tokens), past_key_values=cache)


def test_a_worker_that_fails_costs_no_memory(biased: Small, worker: IntegerWorker) -> None:
    """The masks that a failed forward has not used are used up with it."""
    worker.server._handlers.by_name[OUT_PROJ.name] = lambda *_arguments, **_keywords: None
    with split_of(biased, worker) as split:
        for _ in range(12):
            with pytest.raises(WorkerMismatch):
                split(prompt(30))
        masks: Any = split._offload.shield._masks  # type: ignore[union-attr]
        assert len(masks._layers._stores) <= 2


def test_requests_that_are_batched_get_their_tokens_and_share_nothing(biased: Small, worker: IntegerWorker) -> None:
    """By transformers' scheduler: as alone. A prompt that was there before crosses again: its absence would tell."""
    recording = Recording(worker, QKV)
    with split_of(biased, worker) as split:
        alone = [greedy(split, torch.tensor([ids]), NEW_TOKENS)[0][len(ids) :] for ids in prompts()]
        assert batched(split, prompts()) == alone
        recording.sent.clear()
        crossed = []
        for _ in range(2):
            batched(split, [prompts()[-1]])
            crossed.append(sum(one.shape[1] for one in recording.sent.pop(0)))
        assert crossed[0] == crossed[1] >= len(prompts()[-1])


def test_a_shield_belongs_to_one_model(biased: Small, worker: IntegerWorker, tmp_path: Path) -> None:
    """A second one is refused, and the first goes on."""
    dealt = tmp_path / "masks"
    deal_file(open_checkpoint(str(biased.path)), dealt, 64, 64)
    for masks in (None, dealt):
        shield = OtpShield(masks, ahead=32)
        with split_of(biased, worker, shield=shield) as split:
            expected = split(prompt(5)).logits
            with pytest.raises(LlamaSplitError, match="belongs to one model"):
                split_of(biased, worker, shield=shield)
            assert torch.equal(split(prompt(5)).logits, expected)


def test_a_dropped_model_gives_its_masks_back(biased: Small, worker: IntegerWorker, tmp_path: Path) -> None:
    """As one that is closed, with a warning."""
    dealt = tmp_path / "masks"
    deal_file(open_checkpoint(str(biased.path)), dealt, 64, 64)
    dropped = [split_of(biased, worker, dealt)]
    with pytest.warns(ResourceWarning, match="was dropped"):
        _drop(dropped)
    split_of(biased, worker, dealt).close()


def _drop(dropped: list[Any]) -> None:
    dropped.clear()
    gc.collect()


def test_masks_can_be_dealt_ahead(biased: Small, worker: IntegerWorker, tmp_path: Path) -> None:
    """While nothing is asked for; not where a file has them."""
    shield = OtpShield(ahead=16)
    with split_of(biased, worker, shield=shield) as split:
        shield.deal_ahead(100, 20)
        assert shield.tokens_left >= 100
        before = shield._masks._layers._stores.copy()  # type: ignore[union-attr]
        split(prompt(90))
        assert shield._masks._layers._stores[-1] is before[-1], "none had to be dealt"  # type: ignore[union-attr]
    dealt = tmp_path / "masks"
    deal_file(open_checkpoint(str(biased.path)), dealt, 64, 64)
    with split_of(biased, worker, shield=(shield := OtpShield(dealt))), pytest.raises(LlamaSplitError, match="a file"):
        shield.deal_ahead(100, 1)


def test_the_package_for_the_key_stream_is_named(
    biased: Small, worker: IntegerWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the shield is refused at once, with the extra that installs it."""
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(MissingPackage, match=r"needs the package cryptography: pip install 'shmtransport\[otp\]'"):
        split_of(biased, worker)
