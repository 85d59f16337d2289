"""A worker that dies or drops a session's KV costs time, but no token."""

from __future__ import annotations

import copy
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llama_split import SplitLlamaForCausalLM, WorkerMismatch
from llama_split.boundary.geometry import Geometry
from llama_split.boundary.operations import Mode
from llama_split.boundary.traffic import calls_per_forward
from llama_split.trusted import worker_client
from llama_split.worker.sessions import SessionLimits
from shmtransport import CallTimeout, Closed, PeerDied, RemoteError
from shmtransport.protocol.messages import ChannelKind
from tests.support.children import Mother
from tests.support.llamas import Small, Worker, worker_in_thread
from tests.support.prompts import SHARED, padded_prompts, prompt, single_prompt
from tests.support.workers import Workers, killing


@pytest.mark.parametrize("beams", [1, 2], ids=["greedy", "beams"])
def test_a_generation_survives_kills_at_any_call(plain: Small, workers: Workers, mode: str, beams: int) -> None:
    """Killed with -9 again and again, during forwards and between them, and restarted: the same tokens.

    Every split over both channels, once greedily and once with beams.
    """
    options = {"num_beams": beams}
    channel: ChannelKind = "doorbell" if (mode in ("op", "layer")) == (beams == 1) else "zmq"
    expected = plain.unsplit.generate(**padded_prompts(), **SHARED, **options, do_sample=False)
    workers.start()
    with SplitLlamaForCausalLM.from_pretrained(
        plain.path, worker=workers.address, mode=mode, channel=channel, revive=workers.start
    ) as split:
        per_forward = calls_per_forward(Mode(mode), Geometry.of(plain.unsplit.config))
        kills = killing(split, workers.kill, 3 * per_forward + per_forward // 2 + 1)
        tokens = split.generate(**padded_prompts(), **SHARED, **options, do_sample=False)
        assert len(kills) >= 3
        assert split.workers[0].epoch == len(kills)
        assert torch.equal(tokens, expected)
        workers.kill()


def test_a_worker_that_comes_back_by_itself_is_waited_for(plain: Small, workers: Workers, mode: str) -> None:
    """The split model doesn't start it itself: it waits until another process has."""
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, do_sample=False)
    workers.start()
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=workers.address, mode=mode) as split:
        split.generate(**single_prompt(), max_new_tokens=2, pad_token_id=0)
        workers.kill()
        other = threading.Timer(0.2, workers.start)
        other.start()
        assert torch.equal(split.generate(**single_prompt(), **SHARED, do_sample=False), expected)
        other.join()
        workers.kill()


def test_caches_outlive_their_worker(plain: Small, workers: Workers, mode: str) -> None:
    """A second turn over a cache whose worker has died since; edited caches too."""
    text = prompt(9, batch=3)
    more = prompt(3, batch=3, seed=8)
    rows = torch.tensor([2, 0, 2])
    workers.start()
    with (
        SplitLlamaForCausalLM.from_pretrained(
            plain.path, worker=workers.address, mode=mode, revive=workers.start
        ) as split,
        torch.inference_mode(),
    ):
        cache = split(text, use_cache=True).past_key_values
        cache.crop(-2)
        cache.reorder_cache(rows)
        workers.kill()
        logits = split(more, past_key_values=cache).logits
        expected = plain.unsplit(torch.cat([text[:, :-2][rows], more], dim=1), logits_to_keep=3).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        workers.kill()


def test_without_reconnect_a_dead_worker_is_an_error_at_once(plain: Small, workers: Workers, mode: str) -> None:
    """The caller asked for that; the worker isn't started again either."""
    revived: list[bool] = []
    workers.start()
    with SplitLlamaForCausalLM.from_pretrained(
        plain.path, worker=workers.address, mode=mode, reconnect=False, revive=lambda: revived.append(True)
    ) as split:
        workers.kill()
        with pytest.raises(PeerDied):
            split(prompt())
    assert not revived


def test_tries_are_bounded_and_logged(
    plain: Small, workers: Workers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no worker takes over, the last try's error reports that."""
    monkeypatch.setattr(worker_client, "RECONNECT_TRIES", 2)
    workers.start()
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=workers.address, connect_timeout_s=2.0) as split:
        workers.kill()
        with pytest.raises(PeerDied, match="none took over"):
            split(prompt())
    assert [record.message for record in caplog.records if "try" in record.message][-1].endswith("try 2 of 2")


def test_another_model_that_takes_over_is_refused(
    plain: Small, workers: Workers, save_small: Callable[..., Small], llama_mother: Mother
) -> None:
    """Weights are compared at every connection, not only at the first."""
    other = Workers(llama_mother, save_small(seed=77).path, workers.address)
    try:
        workers.start()
        with SplitLlamaForCausalLM.from_pretrained(
            plain.path, worker=workers.address, revive=lambda: None if other.pid else other.start()
        ) as split:
            workers.kill()
            for _ in range(2):  # a second try is refused as well
                with pytest.raises(WorkerMismatch, match="other weights"):
                    split(prompt())
    finally:
        other.stop()


@pytest.fixture
def narrow(plain: Small) -> Iterator[Worker]:
    """A worker with room for one session, whose sessions are idle as soon as no call uses them."""
    with worker_in_thread(plain.path, limits=SessionLimits(max_sessions=1, idle_s=0.0)) as running:
        yield running


@pytest.mark.parametrize("mode", [Mode.LAYER, Mode.STACK])
@pytest.mark.parametrize("embedded", [False, True], ids=["ids", "embeddings"])
def test_sessions_that_take_each_others_room_give_the_right_tokens(
    plain: Small, narrow: Worker, mode: Mode, embedded: bool
) -> None:
    """Two texts in turn on a worker with room for one: each forward finds its KV gone, and rebuilds it."""
    texts = [prompt(9, seed=40), prompt(14, seed=41)]
    with (
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=narrow.address, mode=mode) as split,
        torch.inference_mode(),
    ):
        caches = [split.new_cache() for _ in texts]
        for _ in range(4):
            for index, cache in enumerate(caches):
                new = texts[index][:, cache.get_seq_length() :]
                inputs = {"inputs_embeds": split.model.embed_tokens(new)} if embedded else {"input_ids": new}
                logits = split(**inputs, past_key_values=cache, logits_to_keep=1).logits
                expected = plain.unsplit(texts[index], logits_to_keep=1).logits
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
                texts[index] = torch.cat([texts[index], logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert len(narrow.service.sessions) == 1


@pytest.mark.parametrize("mode", [Mode.LAYER, Mode.STACK])
def test_a_lost_session_leaves_no_tensor_in_the_arenas(
    plain: Small, narrow: Worker, mode: Mode, caplog: pytest.LogCaptureFixture
) -> None:
    """A handled error keeps nothing that was sent or borrowed, even before a garbage collection."""
    caplog.set_level(logging.CRITICAL, "shmtransport")  # a record that is kept keeps what its traceback refers to
    with SplitLlamaForCausalLM.from_pretrained(
        plain.path, worker=narrow.address, mode=mode, arena_bytes=32 << 10
    ) as split:
        caches = [split.new_cache() for _ in range(2)]
        gc.disable()
        try:
            for turn in range(24):
                split(prompt(8, seed=turn), past_key_values=caches[turn % 2], logits_to_keep=1)
        finally:
            gc.enable()


@pytest.mark.parametrize("mode", [Mode.LAYER, Mode.STACK])
def test_a_copied_cache_goes_on_alone(plain: Small, plain_worker: Worker, mode: Mode) -> None:
    """A prompt's cache may be continued in two ways; the copy's KV is built on first use."""
    prefix = prompt(9)
    with (
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode=mode) as split,
        torch.inference_mode(),
    ):
        cache = split(prefix, use_cache=True).past_key_values
        for seed, each in enumerate((cache, copy.deepcopy(cache), copy.copy(cache))):
            ids = prompt(3, seed=20 + seed)
            logits = split(ids, past_key_values=each).logits
            expected = plain.unsplit(torch.cat([prefix, ids], dim=1), logits_to_keep=3).logits
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", [Mode.LAYER, Mode.STACK])
def test_kv_beyond_the_limit_is_refused_with_its_figures(plain: Small, mode: Mode) -> None:
    """The error gives what is needed, what others hold, the limit and the remedy; the session stays usable."""
    token_bytes = 2 * 3 * 32 * 4  # both, layers, 2 key/value heads of 16, float32
    limits = SessionLimits(max_kv_bytes=token_bytes * 300, idle_s=3600.0)
    with (
        worker_in_thread(plain.path, limits=limits) as worker,
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=worker.address, mode=mode) as split,
        torch.inference_mode(),
    ):
        first, second = split.new_cache(), split.new_cache()
        split(prompt(100), past_key_values=first)
        with pytest.raises(RemoteError, match=r"needs 150\.0 KiB of KV; 96\.0 KiB are held by 1 other.*225\.0 KiB"):
            split(prompt(200), past_key_values=second)
        assert worker.service.sessions.kv_bytes <= token_bytes * 300
        logits = split(prompt(5, seed=3), past_key_values=first).logits
        expected = plain.unsplit(torch.cat([prompt(100), prompt(5, seed=3)], dim=1), logits_to_keep=5).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        del first
        split(prompt(200), past_key_values=second)


@pytest.mark.parametrize("mode", [Mode.LAYER, Mode.STACK])
def test_kv_is_allocated_once_for_the_whole_generation(plain: Small, plain_worker: Worker, mode: Mode) -> None:
    """When its prompt comes, the worker reserves the most that the generation may need, and nothing later."""
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode=mode) as split:
        output = split.generate(
            **single_prompt(), max_new_tokens=150, pad_token_id=0, do_sample=False, return_dict_in_generate=True
        )
        sessions = plain_worker.service.sessions
        (session,) = sessions._sessions.values()
        held = session.cache.layers[0]
        assert held.get_seq_length() == 11 + 150 - 1
        assert held._key_buffer.shape[2] == 11 + 150 - 1
        assert session.kv_bytes == session.cache.nbytes == sessions.kv_bytes
        del output


@pytest.mark.parametrize("mode", [Mode.LAYER, Mode.STACK])
def test_rows_that_would_exceed_the_limit_are_refused_before_they_are_allocated(plain: Small, mode: Mode) -> None:
    """The worker counts a batch that repeats a cache's rows before allocating it, and the cache stays usable."""
    token_bytes = 2 * 3 * 32 * 4
    limits = SessionLimits(max_kv_bytes=token_bytes * 128 * 4)
    text = prompt(9)
    with (
        worker_in_thread(plain.path, limits=limits) as worker,
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=worker.address, mode=mode) as split,
        torch.inference_mode(),
    ):
        cache = split(text, use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
        cache.batch_repeat_interleave(50)
        with pytest.raises(RemoteError, match="of KV"):
            split(prompt(1, batch=50), past_key_values=cache)
        held = sum(session.cache.nbytes for session in worker.service.sessions._sessions.values())
        assert held <= worker.service.sessions.kv_bytes <= token_bytes * 128 * 4
        logits = split(prompt(2, seed=4), past_key_values=copied).logits
        expected = plain.unsplit(torch.cat([text, prompt(2, seed=4)], dim=1), logits_to_keep=2).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_forward_that_fails_leaves_the_cache_as_it_was(plain: Small, plain_worker: Worker, mode: str) -> None:
    """Cut into several calls and failing in a late one, it may be repeated: no token is cached twice."""
    text, more = prompt(40), prompt(400, seed=6)
    with (
        SplitLlamaForCausalLM.from_pretrained(
            plain.path, worker=plain_worker.address, mode=mode, arena_bytes=64 << 10
        ) as split,
        torch.inference_mode(),
    ):
        cache = split(text, use_cache=True).past_key_values
        submit, calls = split.workers[0].client.submit, 0

        def failing(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 6:
                raise CallTimeout("as a test wants it")
            return submit(*arguments, **keywords)

        split.workers[0].client.submit = failing  # type: ignore[method-assign]
        with pytest.raises(CallTimeout):
            split(more, past_key_values=cache)
        assert cache.get_seq_length() == 40
        logits = split(more, past_key_values=cache, logits_to_keep=5).logits
        expected = plain.unsplit(torch.cat([text, more], dim=1), logits_to_keep=5).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_model_closed_while_its_worker_is_waited_for_stays_closed(plain: Small, workers: Workers) -> None:
    """``close()`` in another thread ends the tries; no connection is made after it."""
    workers.start()
    split = SplitLlamaForCausalLM.from_pretrained(plain.path, worker=workers.address, revive=lambda: close())

    def close() -> None:
        split.close()
        workers.start()

    workers.kill()
    with pytest.raises(Closed):
        split(prompt())
    with pytest.raises(Closed):
        split(prompt())
    workers.kill()
