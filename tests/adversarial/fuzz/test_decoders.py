"""Whatever bytes a peer sends, every decoder gives a valid value or refuses. The long run is ``make fuzz``.

The inputs are of two kinds: valid ones damaged by a seeded generator, with forged descriptors, headers and handshakes
among them, and values of the wrong type, length or depth in the place of right ones, by hypothesis.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext

from shmtransport.core.layout import Layout
from shmtransport.errors import PeerProtocolError
from shmtransport.memory.descriptor import MAX_DIMENSIONS
from shmtransport.memory.dtypes import BY_NAME
from shmtransport.protocol.messages import PREAMBLE, encode
from shmtransport.protocol.values import MAX_DEPTH
from tests.support.messages import MESSAGES

from . import __main__ as long_run
from . import rule
from .rule import Broken, Tally, Target, hold, run, watched
from .targets import TARGETS
from .targets.memory import Borrowing, HeaderReading, Validating
from .targets.messages import Decoding, Unpacking
from .targets.protocols import ClientReceiving, ServerReceiving

INPUTS = 1500
SEED = 20260101


@contextlib.contextmanager
def opened(make: Callable[[], Target]) -> Iterator[Target]:
    """Open a target within ``watched()``."""
    with watched(), contextlib.closing(make()) as target:
        yield target


# Damaged inputs


@pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.name)
def test_hostile_input_gives_a_valid_value_or_is_refused(make: type[Target]) -> None:
    """Every input has one of these outcomes, and nothing stays held; each outcome is frequent."""
    tally = Tally()
    with opened(make) as target:
        run(target, Random(SEED), INPUTS, tally)
    assert tally.inputs == INPUTS
    assert min(tally.valid, tally.refused) > INPUTS / 20


@pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.name)
def test_a_seed_gives_the_same_inputs_again(make: type[Target]) -> None:
    """An input that broke the rule can be found again by its seed."""
    with contextlib.closing(make()) as one, contextlib.closing(make()) as other:
        left, right = Random(SEED), Random(SEED)
        assert all(one.generate(left) == other.generate(right) for _ in range(200))


# Values in the wrong place

_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(Ext, st.integers(-128, 127), st.binary(max_size=4) | st.binary(min_size=12, max_size=12))
)
_keys = st.text(max_size=3) | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=3)
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=3), max_leaves=12
)
_counts = st.integers(0, 2**63 - 1) | st.integers(0, 20) | st.sampled_from((64, 4095, 4096, 2**62, 2**63 - 1))
_descriptors = st.tuples(
    _counts, st.lists(_counts, max_size=MAX_DIMENSIONS + 1), st.sampled_from([*BY_NAME, "?"]), _counts, _counts
)


def _with_one_replaced(fields: Any, random: Random, value: Any) -> Any:
    """Replace one field of a message, at any level, by a value."""
    if not isinstance(fields, (list, dict)) or not fields or random.random() < 0.2:
        return value
    fields = fields.copy()
    index = random.choice(list(fields) if isinstance(fields, dict) else range(len(fields)))
    fields[index] = _with_one_replaced(fields[index], random, value)
    return fields


_messages = st.lists(_values, max_size=7) | st.builds(
    _with_one_replaced,
    st.sampled_from([msgspec.msgpack.decode(encode(message)[len(PREAMBLE) :]) for message in MESSAGES]),
    st.randoms(use_true_random=False),
    _values | st.lists(_descriptors, max_size=3),
)


@pytest.mark.parametrize("make", [Decoding, ClientReceiving, ServerReceiving], ids=lambda make: make.name)
def test_messages_of_wrong_types_and_lengths_are_refused(make: type[Target]) -> None:
    """A list that is no message, and a message with another value in one of its fields."""
    with opened(make) as target:

        @given(_messages)
        @settings(max_examples=100)
        def put_in(fields: Any) -> None:
            hold(target, target.carrying(PREAMBLE + msgspec.msgpack.encode(fields)))

        put_in()


def test_values_that_no_sender_makes_are_refused() -> None:
    """Any extension, key or nesting in a result."""
    with opened(Unpacking) as target:

        @given(_values)
        @settings(max_examples=100)
        def put_in(value: Any) -> None:
            hold(target, msgspec.msgpack.encode(value))

        put_in()


def test_forged_descriptors_are_refused() -> None:
    """Any numbers in the fields of descriptors: what is borrowed is what they name."""
    with opened(Borrowing) as borrow, opened(Validating) as validate:

        @given(st.lists(_descriptors, max_size=3))
        @settings(max_examples=100)
        def put_in(descriptors: list[Any]) -> None:
            hold(borrow, msgspec.msgpack.encode(descriptors))
            for descriptor in descriptors:
                hold(validate, msgspec.msgpack.encode((4096, 16, descriptor)))

        put_in()


# Inputs at a limit


@pytest.mark.parametrize("shell", [b"\x91", b"\x81\xa1k", b"\x92\xc7\x00\x03"], ids=["list", "dict", "tuple"])
@pytest.mark.parametrize(("depth", "valid"), [(MAX_DEPTH, True), (MAX_DEPTH + 2, False), (20_000, False)])
def test_nesting_is_allowed_up_to_its_limit(shell: bytes, depth: int, valid: bool) -> None:
    """A value nested up to the limit arrives; one nested far too deep doesn't crash the interpreter."""
    with opened(Unpacking) as target:
        assert hold(target, shell * depth + b"\xc0") is valid


@pytest.mark.parametrize("head", [b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"], ids=bytes.hex)
@pytest.mark.parametrize("times", [1, 900])
def test_a_length_that_lies_reserves_nothing(head: bytes, times: int) -> None:
    """Four bytes that claim four thousand million items make the decoder allocate nothing."""
    with opened(Unpacking) as target:
        assert not hold(target, (head + b"\xff" * 4) * times)


@pytest.mark.parametrize("field", range(3, 10))
@pytest.mark.parametrize("number", [2**61, 2**62, 2**63 - 4096, 2**63 - 1], ids=hex)
def test_a_segment_of_any_size_can_be_refused(field: int, number: int) -> None:
    """A sparse file may be as large as 64 bits say, and name areas that are as large."""
    with opened(HeaderReading) as target:
        header = bytearray(Layout(4096).header())
        header[8 * (field - 1) : 8 * field] = number.to_bytes(8, "little")
        assert not hold(target, bytes(header) + number.to_bytes(8, "little"))


# The rule itself


class _Fake(Target):
    """Does what a decoder must never do."""

    name = "decode"

    def __init__(self, misdeed: Callable[[], object] = lambda: None, left: str = "") -> None:
        self._misdeed = misdeed
        self._left = left

    def generate(self, random: Random) -> bytes:
        return random.randbytes(3)

    def check(self, data: bytes) -> None:
        self._misdeed()

    def leftovers(self) -> str:
        return self._left


class _Unclosable:
    def __del__(self) -> None:
        raise OSError("in a destructor")


def _refuse() -> None:
    raise PeerProtocolError("no")


def _compute_for_ever() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (_Fake({}.popitem), "KeyError"),
        (_Fake(lambda: [[]].index(0)), "ValueError"),
        (_Fake(_compute_for_ever), "more than"),
        (_Fake(lambda: bytearray(2 * rule.HEADROOM_BYTES)), "MemoryError"),
        (_Fake(_Unclosable), "OSError: in a destructor"),
        (_Fake(_refuse, left="1 borrow stays held"), "1 borrow stays held"),
    ],
    ids=["exception", "other exception", "endless", "memory", "destructor", "leftover"],
)
def test_whatever_else_happens_breaks_the_rule(target: Target, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule catches an exception anywhere, endless computing, a large allocation and whatever stays held."""
    monkeypatch.setattr(rule, "CPU_SECONDS", 0.1)
    with watched(), pytest.raises(Broken, match=f"{why}.*; the input is 010203"):
        hold(target, b"\1\2\3")


def test_a_refusal_and_a_value_keep_the_rule() -> None:
    """The tally counts them separately."""
    with watched():
        assert hold(_Fake(), b"")
        assert not hold(_Fake(_refuse), b"")


# The long run


def test_the_long_run_ends_with_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """Every target gets its share of the inputs, and exit code 0 means that none broke the rule."""
    inputs = 10 * len(TARGETS) + 3
    assert long_run.main(["--inputs", str(inputs), "--seed", str(SEED)]) == 0
    output = capsys.readouterr().out
    assert f"--seed {SEED}" in output
    for target in TARGETS:
        assert re.search(rf"^{target.name} +1[01] ", output, re.MULTILINE)
    assert f"{inputs} inputs in " in output


def test_the_long_run_survives_what_ends_a_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent reports the child's fatal signal, with the input; otherwise it passes the exit status on."""
    monkeypatch.setattr(long_run, "TARGETS", (lambda: _Fake(lambda: os.kill(os.getpid(), signal.SIGKILL)),))
    monkeypatch.setattr(long_run.TARGETS[0], "name", "decode", raising=False)
    assert long_run.supervise(["--seed", "7"]) == 1
    assert re.search(r"BROKEN by signal 9: decode; the input is [0-9a-f]{6}\n", capsys.readouterr().err)
    monkeypatch.setattr(long_run, "TARGETS", TARGETS)
    assert long_run.supervise(["--inputs", "10"]) == 0
    assert long_run.supervise(["--inputs", "ten"]) == 2


def test_the_long_run_ends_with_the_input_that_broke_the_rule(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It exits with 1, and prints the seed and the input as hexadecimal digits, which can be replayed."""
    monkeypatch.setattr(long_run, "TARGETS", (lambda: _Fake({}.popitem),))
    monkeypatch.setattr(long_run.TARGETS[0], "name", "decode", raising=False)
    assert long_run.main(["--inputs", "5", "--seed", "7"]) == 1
    said = capsys.readouterr().err
    assert "--seed 7" in said
    assert "KeyError" in said
    found = re.search(r"the input is ([0-9a-f]{6})\n", said)
    assert found is not None
    assert long_run.main(["--target", "decode", "--replay", found[1]]) == 1
    assert found[1] in capsys.readouterr().err
