"""Masks: each is handed out once, whatever happens to the process; its term fits it; what was used is wiped."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from llama_split.boundary.operations import DOWN, LM_HEAD, QKV
from llama_split.checkpoint import Checkpoint, QuantisedCheckpoint, open_checkpoint
from llama_split.checkpoint.matrices import MatrixKey
from llama_split.errors import LlamaSplitError, MasksExhausted
from llama_split.model.integers import multiply_exactly
from llama_split.shields import idle
from llama_split.shields.dealer import DealtMasks, FileMasks, deal_file
from llama_split.shields.mask_pool import BLOCK_ROWS
from llama_split.shields.masks import MaskStore, Taken
from tests.support.children import Child, Mother
from tests.support.helpers import eventually
from tests.support.llamas import VARIANTS, Small
from tests.support.process import ROOT

TOKENS, LOGITS = 96, 32
LEASED = slice(48, 56)
TAKER = ROOT / "tests/support/processes/mask_taker.py"


@pytest.fixture(scope="module")
def model(save_small: Callable[..., Small]) -> Path:
    return save_small(11, **VARIANTS["wide-heads-llama3-rope"]).path


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Checkpoint:
    return open_checkpoint(str(model))


@pytest.fixture(scope="module")
def weights(checkpoint: Checkpoint) -> QuantisedCheckpoint:
    return QuantisedCheckpoint(checkpoint)


@pytest.fixture(scope="module")
def dealt(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of masks that stays unused."""
    path = tmp_path_factory.mktemp("masks") / "unused"
    deal_file(checkpoint, path, TOKENS, LOGITS)
    return path


@pytest.fixture
def file(dealt: Path, tmp_path: Path) -> Path:
    """A file of masks, for one test."""
    return Path(shutil.copy(dealt, tmp_path / "masks"))


def opened(path: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint) -> MaskStore:
    return MaskStore.open(path, checkpoint.fingerprint(), weights.widths)


def matrix_of(weights: QuantisedCheckpoint, matrix: MatrixKey) -> torch.Tensor:
    return torch.cat([block.quantised_mk for block in weights.blocks(matrix)])


def rows_of(taken: Taken) -> list[bytes]:
    return [row.numpy().tobytes() for row in taken.mask_Nk]


def test_each_term_is_the_product_with_its_mask(
    file: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint
) -> None:
    """For every matrix, in calls of any number of rows."""
    store = opened(file, checkpoint, weights)
    for matrix in weights.widths:
        for rows in (1, 20, 5):
            mask_Nk, term_Nm = store.take(matrix, rows)
            assert mask_Nk.shape == (rows, weights.widths[matrix].input)
            assert torch.equal(term_Nm, multiply_exactly(mask_Nk, matrix_of(weights, matrix)))
    store.close()


def test_masks_of_several_dealings_fit_their_terms(weights: QuantisedCheckpoint) -> None:
    """A process that deals its own deals more when they are used up; no row is handed out twice."""
    masks, seen = DealtMasks(weights, ahead=20), set()
    masks.deal_ahead(20, 20)
    for rows in (7, 16, 40, 1, 33):
        for matrix in weights.widths:
            taken = masks.take(matrix, rows)
            assert torch.equal(taken.term_Nm, multiply_exactly(taken.mask_Nk, matrix_of(weights, matrix)))
            assert len(taken.mask_Nk) == rows
            seen.update((matrix, row) for row in rows_of(taken))
    assert len(seen) == len(weights.widths) * (7 + 16 + 40 + 1 + 33)
    masks.close()


def test_masks_are_dealt_in_pauses(weights: QuantisedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was used is replaced, for the layers and for the logits, while nothing is asked for; and they fit."""
    monkeypatch.setattr(idle, "PAUSE_S", 0.05)
    masks, seen = DealtMasks(weights, ahead=32), set()
    masks.deal_ahead(32, 32)
    for _ in range(3):
        for matrix in weights.widths:
            taken = masks.take(matrix, 20)
            assert torch.equal(taken.term_Nm, multiply_exactly(taken.mask_Nk, matrix_of(weights, matrix)))
            seen.update((matrix, row) for row in rows_of(taken))
        assert eventually(lambda: masks._layers.left >= 32 and masks._head.left >= 32)
    assert len(seen) == len(weights.widths) * 60
    masks.close()


def test_a_dealing_that_is_left_keeps_nothing(weights: QuantisedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its store is closed, which wipes it, and another one can be dealt."""
    masks, made = DealtMasks(weights, ahead=32), []
    in_memory = MaskStore.in_memory
    monkeypatch.setattr(MaskStore, "in_memory", lambda *given: made.append(in_memory(*given)) or made[-1])

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        masks._layers.fill(32, None, stop)
    assert masks.left == 0
    with pytest.raises(MasksExhausted, match="closed"):
        made[0].take((DOWN, 0), 1)
    masks.deal_ahead(32, 32)
    assert masks.left >= 32
    masks.close()


def test_masks_that_are_closed_in_the_middle_of_a_dealing_stay_closed(weights: QuantisedCheckpoint) -> None:
    """By the dealing thread itself too, as a garbage collection may: no store is added, and the idle thread ends."""
    masks = DealtMasks(weights, ahead=32)
    with pytest.raises(MasksExhausted, match="closed"):
        masks._layers.fill(32, None, masks.close)
    assert not masks._layers._stores
    masks._idle._thread.join(20.0)
    assert not masks._idle._thread.is_alive()

    masks = DealtMasks(weights, ahead=32)
    with masks._layers._lock, masks._head._lock:  # where it holds these
        masks.close()


def test_dealings_at_once_deal_what_is_asked_for(weights: QuantisedCheckpoint) -> None:
    """Several threads that want the same number in store deal it once, and read the weights one after the other."""
    masks, reading, most = DealtMasks(weights, ahead=16), threading.Lock(), []

    class _Watched:
        widths = weights.widths

        def blocks(self, matrix: MatrixKey) -> Any:
            most.append(reading.acquire(blocking=False))
            time.sleep(0.001)
            yield from weights.blocks(matrix)
            reading.release()

    masks._layers._weights = masks._head._weights = _Watched()  # type: ignore[assignment]
    threads = [threading.Thread(target=masks.deal_ahead, args=(320, 320)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (masks.left, masks._head.left) == (320, 320)
    assert all(most)
    masks.close()


def test_threads_get_all_that_they_ask_for_and_nothing_twice(weights: QuantisedCheckpoint) -> None:
    """While others take what was dealt for them."""
    masks, found = DealtMasks(weights, ahead=16), list[Taken]()

    def take() -> None:
        for _ in range(12):
            found.append(masks.take((DOWN, 1), 24))

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(one.mask_Nk) for one in found] == 36 * [24]
    assert len({row for one in found for row in rows_of(one)}) == 36 * 24
    masks.close()


def test_masks_are_uniform(file: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint) -> None:
    """Bytes of all masks: a chi-squared test that an honest generator fails once in 10⁹ runs."""
    store = opened(file, checkpoint, weights)
    numbers = torch.cat([store.take(matrix, LOGITS).mask_Nk.flatten() for matrix in weights.widths])
    counts = np.bincount(numbers.numpy().view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 6.5 * (2 * 255) ** 0.5
    store.close()


def test_no_mask_is_left_when_all_are_used(file: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint) -> None:
    """The error tells how many are needed, how many there are, and the remedy; the last ones can still be used."""
    masks = FileMasks(file, checkpoint, weights)
    masks.take((DOWN, 1), TOKENS - 5)
    with pytest.raises(MasksExhausted, match="6 masks for down are needed and 5 are left: deal more"):
        masks.take((DOWN, 1), 6)
    masks.take((DOWN, 1), 5)
    with pytest.raises(MasksExhausted, match="0 are left"):
        masks.take((DOWN, 1), 1)
    masks.take((LM_HEAD, 0), LOGITS)
    with pytest.raises(MasksExhausted, match="for lm_head"):
        masks.take((LM_HEAD, 0), 1)
    masks.take((DOWN, 0), 1)
    masks.close()


def test_a_mask_is_leased_before_it_is_handed_out(
    file: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the time that the key stream is computed the file tells, and was synchronised since."""
    synchronised: list[int] = []

    class Recording(mmap.mmap):
        def flush(self, *arguments: int) -> None:
            super().flush(*arguments)
            synchronised.append(int.from_bytes(file.read_bytes()[LEASED], "little"))

    def computed(store: MaskStore, matrix: MatrixKey, first: int, end: int) -> torch.Tensor:
        assert synchronised[-1] >= end
        return masks(store, matrix, first, end)

    masks = MaskStore.masks
    monkeypatch.setattr("llama_split.shields.masks.mmap.mmap", Recording)
    monkeypatch.setattr(MaskStore, "masks", computed)
    store = opened(file, checkpoint, weights)
    for rows in (3, BLOCK_ROWS - 3, 1, 2 * BLOCK_ROWS):
        store.take((QKV, 0), rows)
    assert synchronised[-3:] == [BLOCK_ROWS, 2 * BLOCK_ROWS, 4 * BLOCK_ROWS]
    store.close()


def vanish(store: MaskStore) -> None:
    """Leave a file as a process does that is killed: nothing is wiped, only the lock is gone."""
    store._give_back()


class Lives(RuleBasedStateMachine):
    """A file of masks over several lives of a process, some of which end without closing it."""

    path: Path
    checkpoint: Checkpoint
    weights: QuantisedCheckpoint
    dealt: Path

    def __init__(self) -> None:
        super().__init__()
        shutil.copy(self.dealt, self.path)
        self.seen: set[tuple[MatrixKey, bytes]] = set()
        self.store = opened(self.path, self.checkpoint, self.weights)

    @rule(index=st.integers(0, 12), rows=st.integers(1, 40))
    def take(self, index: int, rows: int) -> None:
        matrix = list(self.weights.widths)[index]
        try:
            taken = self.store.take(matrix, rows)
        except MasksExhausted:
            return
        found = {(matrix, row) for row in rows_of(taken)}
        assert len(found) == rows
        assert not found & self.seen
        self.seen |= found

    @rule(closed=st.booleans())
    @precondition(lambda self: self.seen)
    def begin_again(self, closed: bool) -> None:
        if closed:
            self.store.close()
        else:
            vanish(self.store)
        self.store = opened(self.path, self.checkpoint, self.weights)

    @invariant()
    def used_masks_are_not_in_the_file(self) -> None:
        """Neither a key nor a term of what was handed out in whole blocks."""
        for pool in self.store._pools:
            done = min(pool.next.values()) // BLOCK_ROWS
            for matrix, terms in pool.terms.items():
                assert not terms[: pool.next[matrix]].any()
            assert not pool.keys[:done].any()

    def teardown(self) -> None:
        self.store.close()


def test_nothing_is_handed_out_twice_and_what_was_used_is_wiped(
    dealt: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint, tmp_path: Path
) -> None:
    """Over any sequence of calls, ends and beginnings; see ``Lives``."""

    class Machine(Lives):
        pass

    Machine.dealt, Machine.path = dealt, tmp_path / "masks"
    Machine.checkpoint, Machine.weights = checkpoint, weights
    run_state_machine_as_test(Machine, settings=settings(max_examples=25, stateful_step_count=30))


def test_a_killed_process_costs_masks_and_repeats_none(
    model: Path, checkpoint: Checkpoint, llama_mother: Mother, tmp_path: Path
) -> None:
    """SIGKILL at any moment, fifteen times: of all masks that the processes were handed, no two are alike."""
    path, seen, generator = tmp_path / "masks", [], random.Random(7)
    deal_file(checkpoint, path, 3000, 3000)
    for _ in range(15):
        child = Child(llama_mother, TAKER, str(model), str(path))
        seen += [child.readline() for _ in range(generator.randrange(1, 250))]
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        seen += child.output.read().split()
        child.end()
    assert all(len(one) == 32 for one in seen)
    assert len(seen) > 500
    assert len(set(seen)) == len(seen)


def test_what_a_killed_process_left_is_wiped(file: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint) -> None:
    """When the file is opened again: keys and terms of all that was leased, used or not, and nothing else."""
    store = opened(file, checkpoint, weights)
    store.take((QKV, 1), 20)
    vanish(store)
    again = opened(file, checkpoint, weights)
    for pool, leased in zip(again._pools, (2 * BLOCK_ROWS, 0), strict=True):
        blocks = leased // BLOCK_ROWS
        assert not pool.keys[:blocks].any()
        assert pool.keys[blocks:].any(axis=1).all()
        for terms in pool.terms.values():
            assert not terms[:leased].any()
            assert terms[leased:].any(axis=1).all()
    again.close()


def test_a_file_is_used_by_one_process_at_a_time(
    file: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint
) -> None:
    """The second one is refused, until the first has closed it; a forked child can't use its parent's."""
    store = opened(file, checkpoint, weights)
    with pytest.raises(LlamaSplitError, match="in use by another process"):
        opened(file, checkpoint, weights)
    child = os.fork()
    if child == 0:
        try:
            store.take((QKV, 0), 1)
        except MasksExhausted as error:
            os._exit(7 if "forked" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    store.close()
    opened(file, checkpoint, weights).close()


def test_threads_share_masks_and_none_is_handed_out_twice(
    file: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight threads take at once, each while the others are in the middle of it."""
    computed = MaskStore.masks

    def slowly(*given: Any) -> torch.Tensor:
        time.sleep(0.002)
        return computed(*given)

    monkeypatch.setattr(MaskStore, "masks", slowly)
    masks, seen = FileMasks(file, checkpoint, weights), []

    def take() -> None:
        for _ in range(4):
            seen.extend(rows_of(masks.take((DOWN, 2), 3)))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == len(seen) == TOKENS
    masks.close()


def test_a_file_for_another_model_is_refused(
    file: Path, weights: QuantisedCheckpoint, checkpoint: Checkpoint, save_small: Callable[..., Small]
) -> None:
    """By its fingerprint, before anything is used up."""
    other = open_checkpoint(str(save_small(12, **VARIANTS["wide-heads-llama3-rope"]).path))
    with pytest.raises(LlamaSplitError, match="for another model"):
        FileMasks(file, other, weights)
    FileMasks(file, checkpoint, weights).close()


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def _other_magic(path: Path) -> None:
    path.write_bytes(b"x" + path.read_bytes()[1:])


def _odd_capacity(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[40:48] = (TOKENS + 1).to_bytes(8, "little")
    path.write_bytes(content)


def _too_much_leased(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[LEASED] = (TOKENS + BLOCK_ROWS).to_bytes(8, "little")
    path.write_bytes(content)


def _huge(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[40:48] = b"\xf0" + b"\xff" * 7
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_cut, "is damaged"),
        (_other_magic, "is no complete file of masks"),
        (_odd_capacity, "is damaged"),
        (_too_much_leased, "is damaged"),
        (_huge, "is damaged"),
        (lambda path: path.write_bytes(b""), "is no complete file of masks"),
        (lambda path: path.chmod(0o640), "can be read by other users"),
        (Path.unlink, "can't be opened: No such file"),
    ],
    ids=["cut", "magic", "capacity", "leased", "huge", "empty", "readable", "missing"],
)
def test_a_file_that_can_not_be_used_is_refused_in_words(
    file: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint, harm: Callable[[Path], object], words: str
) -> None:
    """Damaged, not ours, or open to others."""
    harm(file)
    with pytest.raises(LlamaSplitError, match=words):
        opened(file, checkpoint, weights)


def test_a_file_is_never_replaced(dealt: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Dealing to a name that exists leaves that file as it is, and a symlink's target too."""
    before = dealt.read_bytes()
    (tmp_path / "link").symlink_to(dealt)
    (tmp_path / "nowhere").symlink_to(tmp_path / "target")
    for path in (dealt, tmp_path / "link", tmp_path / "nowhere"):
        with pytest.raises(LlamaSplitError, match="exists, and is not replaced"):
            deal_file(checkpoint, path, TOKENS, LOGITS)
    assert dealt.read_bytes() == before
    assert not (tmp_path / "target").exists()


def test_a_file_can_be_used_only_when_it_is_complete(
    checkpoint: Checkpoint, weights: QuantisedCheckpoint, tmp_path: Path
) -> None:
    """While it is being dealt, after a dealer that was killed, and after one that failed, which leaves no file."""
    path, copied = tmp_path / "masks", tmp_path / "copied"

    def fail(done: int, total: int) -> None:
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(LlamaSplitError, match="in use by another process"):
            opened(path, checkpoint, weights)
        with pytest.raises(LlamaSplitError, match="another process is dealing"):
            deal_file(checkpoint, path, 16, 16)
        shutil.copy(path, copied)
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deal_file(checkpoint, path, 16, 16, progress=fail)
    assert [one.name for one in tmp_path.iterdir()] == ["copied"]
    with pytest.raises(LlamaSplitError, match="no complete file of masks: remove it"):
        opened(copied, checkpoint, weights)
    deal_file(checkpoint, path, 16, 16)
    opened(path, checkpoint, weights).close()


def test_a_key_that_is_missing_is_not_used(file: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint) -> None:
    """Zeros in place of a key would make masks that anyone can compute."""
    with file.open("r+b") as written:
        written.seek(4096)
        written.write(bytes(4096))
    masks = FileMasks(file, checkpoint, weights)
    with pytest.raises(LlamaSplitError, match="damaged: a key is missing"):
        masks.take((QKV, 0), 1)
    assert len(masks.take((LM_HEAD, 0), 1).mask_Nk) == 1
    masks.close()


def test_nothing_is_handed_out_after_the_file_could_not_be_synchronised(
    file: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second try may succeed without having written what the first one lost."""
    fails = False

    class Failing(mmap.mmap):
        def flush(self, *arguments: int) -> None:
            if fails:
                raise OSError(5, "Input/output error")
            super().flush(*arguments)

    monkeypatch.setattr("llama_split.shields.masks.mmap.mmap", Failing)
    store = opened(file, checkpoint, weights)
    fails = True
    with pytest.raises(LlamaSplitError, match=r"could not be synchronised: nothing .* \(Input/output error\)"):
        store.take((QKV, 0), 1)
    fails = False
    with pytest.raises(MasksExhausted, match="could not be synchronised"):
        store.take((QKV, 0), 1)
    store.close()


def test_an_interrupted_lease_costs_masks_only(
    file: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of it is no failure of the file."""
    store = opened(file, checkpoint, weights)
    pool, interrupts = store._pools[0], [KeyboardInterrupt]
    synchronise = pool._synchronise

    def interrupted() -> None:
        synchronise()
        if interrupts:
            raise interrupts.pop()

    monkeypatch.setattr(pool, "_synchronise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.take((QKV, 0), 1)
    mask_Nk, term_Nm = store.take((QKV, 0), 3)
    assert torch.equal(term_Nm, multiply_exactly(mask_Nk, matrix_of(weights, (QKV, 0))))
    store.close()


@pytest.mark.parametrize("from_file", [True, False])
def test_closed_masks_are_not_handed_out(
    file: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint, from_file: bool
) -> None:
    """Not after the end, and not by a call that was under way when another thread closed them."""
    masks = FileMasks(file, checkpoint, weights) if from_file else DealtMasks(weights, ahead=16)
    masks.take((QKV, 0), 1)
    masks.close()
    masks.close()
    with pytest.raises(MasksExhausted, match="were closed"):
        masks.take((QKV, 0), 1)
    assert masks.left == 0


def test_masks_are_closed_only_between_two_calls(
    file: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their keys are not wiped while the key stream is being computed."""
    store, computed = opened(file, checkpoint, weights), MaskStore.masks
    closing = threading.Thread(target=store.close)

    def closed_meanwhile(*given: Any) -> torch.Tensor:
        closing.start()
        time.sleep(0.05)
        return computed(*given)

    monkeypatch.setattr(MaskStore, "masks", closed_meanwhile)
    mask_Nk, term_Nm = store.take((QKV, 0), 2)
    closing.join()
    assert torch.equal(term_Nm, multiply_exactly(mask_Nk, matrix_of(weights, (QKV, 0))))


def test_a_child_that_is_forked_while_masks_are_taken_does_not_hang(weights: QuantisedCheckpoint) -> None:
    """Whatever lock another thread held then."""
    masks = DealtMasks(weights, ahead=16)
    with masks._layers._lock:
        child = os.fork()
        if child == 0:
            try:
                masks.take((QKV, 0), 1)
            except MasksExhausted as error:
                masks.level()
                masks.close()
                os._exit(7 if "forked" in str(error) else 1)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    masks.close()


def test_forwards_that_fail_leave_no_masks_behind(weights: QuantisedCheckpoint) -> None:
    """What only some matrices have used is used up for all, and wiped: memory stays bounded."""
    masks = DealtMasks(weights, ahead=20)
    for _ in range(20):
        masks.take((QKV, 0), 15)
        masks.level()
    assert len(masks._layers._stores) <= 1
    for store in masks._layers._stores:
        (pool,) = (pool for pool in store._pools if pool.next)
        assert len(set(pool.next.values())) == 1
        assert not any(terms[: pool.next[matrix]].any() for matrix, terms in pool.terms.items())
        assert not pool.keys[: min(pool.next.values()) // BLOCK_ROWS].any()
    masks.close()


def test_a_disk_without_room_is_reported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """How much was needed; nothing is left."""
    with pytest.raises(LlamaSplitError, match=r"can't be written with \d+ bytes"):
        deal_file(checkpoint, tmp_path / "masks", 1 << 40, 1 << 40)
    assert not list(tmp_path.iterdir())
