from collections.abc import Callable, Iterator
from typing import Any

from typing_extensions import Self

FORMAT_VERSION: int

class Block:
    offset: int
    nbytes: int
    held: bool
    def __new__(cls, offset: int, nbytes: int) -> Block: ...

class NextFitAllocator:
    capacity: int
    def __new__(cls, capacity: int) -> NextFitAllocator: ...
    def __len__(self) -> int: ...
    def claim(self, nbytes: int) -> Block | None: ...
    def release(self, block: Block) -> None: ...
    def has_room(self, nbytes: int) -> bool: ...
    def largest_gap(self) -> int: ...

class MessageRing:
    largest_message: int
    def __new__(
        cls,
        own_address: int,
        own_nbytes: int,
        own_memory: object,
        peer_address: int,
        peer_nbytes: int,
        peer_memory: object,
    ) -> Self: ...
    def write(self, data: bytes) -> bool: ...
    def read(self) -> bytes | None: ...
    def readable(self) -> bool: ...
    def want_room(self, wanted: bool) -> None: ...
    def sleep(self, sleeps: bool) -> None: ...
    def take_post(self) -> bool: ...
    def end(self) -> None: ...
    def ended(self) -> bool: ...
    def wait_readable(self, deadline: float) -> bool: ...

class Bell:
    def __new__(cls) -> Self: ...
    def post(self) -> None: ...
    def wait(self, rings: tuple[MessageRing, ...], timeout_s: float, /) -> bool: ...

def encode_request(
    call_id: int,
    method: str,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    pack: Callable[[Any, int], Any],
    descriptors: list[Any],
    loans: Any,
    /,
) -> tuple[bytes, int, int, int]: ...
def encode_reply(
    call_id: int, result: Any, pack: Callable[[Any, int], Any], descriptors: list[Any], loans: Any, /
) -> tuple[bytes, int, int, int]: ...
def decode_call(
    data: bytes, describe: Callable[..., Any], /
) -> tuple[int, str | None, tuple[Any, ...], int] | None: ...
def take_call(data: bytes, tag: int, borrows: Any, /) -> tuple[Any, ...] | None: ...
def decode_values(
    tag: int, data: bytes, start: int, tensors: tuple[Any, ...], to_array: Callable[[Any], Any], /
) -> Any: ...

class Counters:
    calls: int
    failures: int
    control_bytes_sent: int
    control_bytes_received: int
    tensors_sent: int
    tensor_bytes_sent: int
    tensor_bytes_received: int
    tensors_copied: int
    bytes_copied: int
    waits: int
    stalls: int
    in_flight_peak: int
    call_seconds: float
    serialize_seconds: float
    deserialize_seconds: float
    stall_seconds: float
    def count_sent(
        self,
        control_bytes: int,
        seconds: float = 0.0,
        tensors: int = 0,
        tensor_bytes: int = 0,
        copied: int = 0,
        copied_bytes: int = 0,
    ) -> None: ...
    def count_received(self, control_bytes: int, tensor_bytes: int, seconds: float) -> None: ...
    def count_call(self, seconds: float, failed: bool = False) -> None: ...
    def count_failure(self) -> None: ...
    def count_in_flight(self, calls: int) -> None: ...
    def count_wait(self) -> None: ...
    def count_stall(self) -> None: ...
    def count_stalled(self, seconds: float) -> None: ...
    def latencies(self) -> list[int]: ...

class Patience:
    def __new__(cls, spin_s: float | None) -> Self: ...
    def seconds(self) -> float: ...
    def learn(self, found: bool) -> None: ...

class CallState:
    method: str
    data: bytes | None
    error: BaseException | None
    callbacks: list[Callable[[], object]] | None
    result: Any
    call_id: int
    generation: int
    submitted: float
    ready: bool
    ended: bool
    has_tensors: bool
    handed_out: bool
    def __init__(self, method: str) -> None: ...

class DirectCalls:
    def __init__(
        self,
        ring: MessageRing,
        pending: dict[int, Any],
        ids: Iterator[int],
        loans: Any,
        borrows: Any,
        counters: Counters,
        call_back: Callable[[Any], None],
        acquire: Callable[..., bool],
        release: Callable[[], None],
        followers: dict[object, Any],
        received_for: list[object],
        begin_receiving: Callable[[Any], bool],
        end_receiving: Callable[[Any], object],
        largest_message: int,
        patience: Patience,
        bell: Bell,
    ) -> None: ...
    def call(self, call: CallState, given: list[tuple[tuple[Any, ...], dict[str, Any]]], seconds: float, /) -> Any: ...
    def begin(self, call: CallState, arguments: tuple[Any, ...], keywords: dict[str, Any], /) -> bool: ...
    def wait(self, call: CallState, seconds: float, /) -> bool: ...
    def close(self) -> None: ...

class MessageCalls:
    def __init__(
        self,
        pending: dict[int, Any],
        ids: Iterator[int],
        loans: Any,
        borrows: Any,
        counters: Counters,
        largest_message: int,
    ) -> None: ...
    def encode(self, call: CallState, arguments: tuple[Any, ...], keywords: dict[str, Any], /) -> bytes | None: ...
    def take(self, message: bytes, /) -> Any: ...

class DirectAnswers:
    def __init__(
        self,
        ring: MessageRing | None,
        handlers: dict[str, Callable[..., Any]],
        loans: Any,
        borrows: Any,
        counters: Counters,
        set_caller: Callable[[Any], Any],
        reset_caller: Callable[[Any], None],
        caller: Any,
        largest_message: int,
    ) -> None: ...
    heard: bool
    def answer(self, messages: list[bytes], /) -> Any: ...
    def close(self) -> None: ...

def answer_in_turn(
    answers: tuple[DirectAnswers, ...],
    attention: bytearray,
    patience: Patience,
    bell: Bell,
    turn_seconds: float,
    sleep_seconds: float,
    /,
) -> bool | tuple[int, Any]: ...

class Mapping:
    address: int
    was_cut: bool
    def __new__(cls, fd: int, nbytes: int, is_guarded: bool) -> Mapping: ...
    def madvise(self, option: int, start: int = ..., length: int = ..., /) -> None: ...

class Tensors:
    def __new__(
        cls,
        kind: type,
        rows: tuple[tuple[Any, str, int, int, int, bool], ...],
        arrays: tuple[type, Callable[[Any], Any], Callable[[Any], Any]] | None,
        /,
    ) -> Tensors: ...

class Borrows:
    def __new__(
        cls,
        data_mapping: Mapping,
        data_offset: int,
        data_bytes: int,
        cells_mapping: Mapping,
        cells_offset: int,
        slots: int,
        tensors: Tensors,
    ) -> Self: ...
    def __len__(self) -> int: ...
    def borrow(self, offset: int, shape: tuple[int, ...], dtype: str, slot: int, sequence: int, /) -> Any: ...
    def abandon(self) -> None: ...

class Claim:
    offset: int

class Loans:
    capacity: int
    blocks: int
    held_by_peer: int
    has_slot: bool
    knows_tensors: bool
    def __new__(
        cls,
        data_mapping: Mapping,
        data_offset: int,
        data_bytes: int,
        cells_mapping: Mapping,
        cells_offset: int,
        slots: int,
        tensors: Tensors,
        describe: Callable[..., Any],
    ) -> Self: ...
    def lend(self, shape: Any, dtype: Any, /) -> Any: ...
    def export(self, tensor: Any, out: list[Any], /) -> int | None: ...
    def claim(self, nbytes: int, /) -> Claim | None: ...
    def hold(
        self, what: int | Claim, offset: int, shape: tuple[int, ...], dtype: str, out: list[Any], /
    ) -> bool | None: ...
    def give_back(self, claim: Claim, /) -> None: ...
    def has(self, start: int, /) -> bool: ...
    def end_hold(self, slot: int, sequence: int, /) -> None: ...
    def collect(self) -> None: ...
    def has_room(self, nbytes: int, /) -> bool: ...
    def largest_gap(self) -> int: ...
    def oldest_s(self) -> float: ...
