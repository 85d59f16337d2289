"""Lends tensors in this process's own segment, describes them to the peer, and holds them until the peer releases them.

What is lent and held is the core's (``core/loans``). This module knows which tensors may be sent in place, copies all
others in, waits for room, and says in words what is wrong.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ..core.layout import PAGE_BYTES
from ..core.tensors import MAX_DIMENSIONS, address_of_memory
from ..errors import ArenaFull, CallTimeout, LocalProtocolError, TensorTooLarge, TransportError
from ..units import size_text
from .descriptor import DEVICE_OFFSET, TensorDescriptor
from .dtypes import INTEGERS, AnyDType, DType
from .plain import address_of, check_content, refuse_copy, row_of, row_of_array, sizes_of, without_bytes
from .segment import Segment
from .views import TENSORS, Loans, tensor_over, view

FIRST_PAUSE_S, LONGEST_PAUSE_S = 50e-6, 5e-3  # between two looks for room: a release wakes no thread
_BEYOND = 2**70  # bytes: beyond any arena, and beyond any number that an error can show

if TYPE_CHECKING:
    from ..core import Counters


class DeviceCopy(Protocol):
    """A copy by a GPU that may still be under way."""

    def done(self) -> bool: ...


class Device(Protocol):
    """What an arena uses of a GPU that copies to it by itself; see ``cuda.copies``."""

    @property
    def arena(self) -> Any: ...

    def find(self, value: Any) -> Any: ...

    def export(self, found: Any, out: list[TensorDescriptor]) -> DeviceCopy | None: ...

    def to_arena(self, found: Any, address: int) -> DeviceCopy: ...

    def when_done(self, copy: DeviceCopy, action: Callable[[], None]) -> None: ...


class Unfinished:
    """A message some of whose tensors a GPU is still copying in; it must not be sent before."""

    def __init__(self) -> None:
        self.copies: list[tuple[TensorDescriptor, DeviceCopy]] = []
        self.descriptors: Sequence[TensorDescriptor] = ()
        """Of all its tensors, once it is encoded."""

    def take(self, descriptor: TensorDescriptor) -> DeviceCopy | None:
        """Forget a tensor, and return the copy of it that is under way, if one is."""
        for place, (known, copy) in enumerate(self.copies):
            if known == descriptor:
                del self.copies[place]
                return copy
        return None

    def done(self) -> bool:
        """Return whether all of its tensors are there, without waiting.

        Raises:
            DeviceError: The GPU has failed.
        """
        return all(copy.done() for _, copy in self.copies)


class SendArena:
    """This process's own segment, seen as tensors to send. Safe for use by several threads.

    Args:
        segment: this process's own.
        peer_released: the cells of the release table in the peer's segment.
        counters: where stalls are counted.
        claim_timeout_s: how long in seconds a claim without room waits for the peer to release something.
        check_peer: called again and again during such a wait; raises if the peer can't release anything any longer.
        device: copies tensors on a GPU in. Default: torch does, and the caller waits.
    """

    def __init__(
        self,
        segment: Segment,
        peer_released: memoryview,
        counters: Counters,
        claim_timeout_s: float = 0.0,
        check_peer: Callable[[], None] = lambda: None,
        device: Device | None = None,
    ) -> None:
        self._data = segment.data
        self._address = address_of_memory(self._data)
        self.loans = Loans(self._data, peer_released, TENSORS)
        """What is lent and held, for the core."""
        self._lend = self.loans.lend
        self._export = self.loans.export if self.loans.knows_tensors else None
        self._counters = counters
        self._claim_timeout_s = claim_timeout_s
        self._this_thread = threading.local()
        self._check_peer = check_peer
        self._device = device
        self.copies: dict[int, int] = {}
        """Sizes in bytes of tensors that were copied in for messages that have not been sent yet, by sequence."""

    def lend(self, shape: int | Sequence[int], dtype: AnyDType) -> torch.Tensor:
        """Lend an uninitialised, contiguous CPU tensor of ``shape`` in this arena.

        Raises:
            TensorTooLarge: it exceeds the whole arena.
            ArenaFull: no gap is large enough, and waiting made none.
            LocalProtocolError: the dtype or shape can't be sent.
        """
        try:
            tensor: torch.Tensor | None = self._lend(shape, dtype)
        except TypeError:  # such as a dtype that has no hash
            tensor = None
        return self._lend_slowly(shape, dtype) if tensor is None else tensor

    def _lend_slowly(self, shape: int | Sequence[int], dtype: AnyDType) -> torch.Tensor:
        """Lend what may have to wait for room, or may be no tensor that can be had."""
        sizes = sizes_of(shape)
        row = row_of(dtype)
        nbytes = math.prod(sizes) * row.itemsize
        if not 0 < nbytes < _BEYOND or len(sizes) > MAX_DIMENSIONS or (sizes and min(sizes) < 0):
            return without_bytes(sizes, row)
        while (tensor := self._lend(sizes, row.torch)) is None:
            self._wait_for_room(nbytes)
        lent: torch.Tensor = tensor
        return lent

    @contextlib.contextmanager
    def claims_within(self, timeout_s: float) -> Iterator[None]:
        """Bound this thread's claims by ``timeout_s`` seconds in all, in place of the arena's time for each."""
        outer = vars(self._this_thread).get("deadline")
        self._this_thread.deadline = time.monotonic() + timeout_s
        try:
            yield
        finally:
            if outer is None:
                del self._this_thread.deadline
            else:
                self._this_thread.deadline = outer

    def export(self, tensor: torch.Tensor) -> TensorDescriptor:
        """Describe a tensor to the peer and hold its block until the peer releases it.

        A contiguous tensor over one of this arena's loans is not copied; any other is copied in once.

        Raises:
            As ``lend``.
        """
        out: list[TensorDescriptor] = []
        try:
            copied = None if self._export is None else self._export(tensor, out)
            if copied is None:
                self._export_slowly(tensor, out)
            elif copied:
                self.copies[out[-1].sequence] = copied
        except BaseException:
            self.withdraw(out)
            raise
        return out[0]

    def _export_slowly(self, tensor: torch.Tensor, out: list[TensorDescriptor]) -> None:
        row = row_of(tensor.dtype)
        while True:
            # Looked at again after each wait: another thread may have given the tensor other memory.
            start = address_of(tensor)  # only a CPU tensor has its storage at one of these addresses
            shape = tuple(tensor.shape)
            if not (
                self.loans.has(start)
                and tensor.is_contiguous()
                and not (tensor.is_conj() or tensor.is_neg())
                and len(shape) <= MAX_DIMENSIONS
                and tensor.nbytes > 0
            ):
                break
            held = self.loans.hold(start, tensor.data_ptr() - self._address, shape, row.name, out)
            if held:
                return
            if held is False:
                self._wait_for_slot()
        check_content(tensor, row)
        if not tensor.is_cpu and self._device is not None and (found := self._device.find(tensor)) is not None:
            self._export_from_device(self._device, found, out)
            return
        self._export_copy(tensor.detach() if tensor.requires_grad else tensor, shape, row, out)

    def has_lent(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in one of this arena's loans, so that it needs no more room to be sent."""
        return self.loans.has(address_of(tensor)) and tensor.is_contiguous()

    def export_array(self, array: np.ndarray[Any, Any]) -> TensorDescriptor:
        """Describe a numpy array, of any strides and byte order, read-only or not; see ``export``."""
        row = row_of_array(array)
        if row.numpy is None:
            array = array.view(row.carrier.newbyteorder(array.dtype.byteorder))
        if (tensor := tensor_over(array)) is not None:
            return self.export(tensor if row.numpy is not None else tensor.view(row.torch))
        out: list[TensorDescriptor] = []
        try:
            self._export_copy(array, array.shape, row, out)
        except BaseException:
            self.withdraw(out)
            raise
        return out[0]

    def export_foreign(self, tensor: Any) -> TensorDescriptor:
        """Describe a tensor on a GPU that is another library's; see ``export``."""
        found = None if self._device is None else self._device.find(tensor)
        if self._device is None or found is None:
            raise LocalProtocolError(
                f"a {type(tensor).__name__} on a GPU can't be sent: only what is on the GPU of a Server(device=…) can"
            )
        out: list[TensorDescriptor] = []
        self._export_from_device(self._device, found, out)
        return out[0]

    @property
    def _unfinished(self) -> Unfinished | None:
        """The message that this thread is making, if the device is copying any tensor of it in."""
        return None if self._device is None else vars(self._this_thread).get("unfinished")

    def finish(self) -> None:
        """Wait until the device has copied in the tensors of the message that this thread has just encoded.

        Raises:
            CallTimeout: It has not in time.
            DeviceError: It has failed.
        """
        unfinished = self._unfinished
        if unfinished is None:
            return
        deadline: float = getattr(self._this_thread, "deadline", time.monotonic() + self._claim_timeout_s)
        while not unfinished.done():
            if time.monotonic() > deadline:
                raise CallTimeout("the call was not sent: the GPU has not completed its arguments in time")
            time.sleep(FIRST_PAUSE_S)
        self.take_unfinished()

    def complete(self, descriptors: Sequence[TensorDescriptor]) -> None:
        """The message that this thread has just encoded has these tensors."""
        unfinished = self._unfinished
        if unfinished is not None:
            unfinished.descriptors = tuple(descriptors)

    def take_unfinished(self) -> Unfinished | None:
        """Return the tensors of the message that this thread has just encoded, if the device is copying any in."""
        return None if self._device is None else vars(self._this_thread).pop("unfinished", None)

    @property
    def held_by_peer(self) -> int:
        """How many sent tensors are not known to be released by the peer."""
        held: int = self.loans.held_by_peer
        return held

    def withdraw(self, descriptors: Sequence[TensorDescriptor]) -> None:
        """Take back descriptors that were never sent; what a GPU still copies in, once it has done that."""
        unfinished = self._unfinished
        self._withdraw(descriptors, unfinished)
        if unfinished is not None and not unfinished.copies:
            self.take_unfinished()

    def withdraw_unfinished(self, unfinished: Unfinished) -> None:
        """Take back a message that was encoded and never sent; see ``withdraw``."""
        self._withdraw(unfinished.descriptors, unfinished)

    def _withdraw(self, descriptors: Sequence[TensorDescriptor], unfinished: Unfinished | None) -> None:
        for descriptor in descriptors:
            if descriptor.sequence:
                copy = None if unfinished is None else unfinished.take(descriptor)
                self._behind(copy, functools.partial(self._end_hold, descriptor))

    def _behind(self, copy: DeviceCopy | None, action: Callable[[], None]) -> None:
        """Do something once the device has made a copy; now if there is none."""
        if copy is None or self._device is None:
            action()
        else:
            self._device.when_done(copy, action)

    def _end_hold(self, descriptor: TensorDescriptor) -> None:
        if descriptor.offset < DEVICE_OFFSET:
            self.copies.pop(descriptor.sequence, None)
            self.loans.end_hold(descriptor.slot, descriptor.sequence)
        elif self._device is not None and self._device.arena is not None:
            self._device.arena.loans.end_hold(descriptor.slot, descriptor.sequence)

    def _export_copy(
        self,
        source: torch.Tensor | np.ndarray[Any, Any],
        shape: tuple[int, ...],
        row: DType,
        out: list[TensorDescriptor],
    ) -> None:
        """Copy a tensor into a block that is free again once the peer has released it."""

        def write(offset: int) -> None:
            self._write(offset, source, shape, row)

        try:
            self._place(math.prod(shape) * row.itemsize, shape, row, out, write)
        except TransportError:
            raise
        except Exception as error:  # noqa: BLE001 - another library's code may raise anything
            refuse_copy(error)

    def _export_from_device(self, device: Device, found: Any, out: list[TensorDescriptor]) -> None:
        """Have the device copy a tensor into a block; until it has, the tensor is among the unfinished ones."""
        copy = device.export(found, out) if found.nbytes else None
        if copy is None:
            to_arena = functools.partial(device.to_arena, found)
            copy = self._place(
                found.nbytes, found.shape, found.row, out, lambda offset: to_arena(self._address + offset)
            )
        if copy is not None:
            self._expect(out[-1], copy)

    def _place(
        self,
        nbytes: int,
        shape: tuple[int, ...],
        row: DType,
        out: list[TensorDescriptor],
        write: Callable[[int], DeviceCopy | None],
    ) -> DeviceCopy | None:
        """Claim a block, have it written at its offset, and describe it; return a copy that may be under way there."""
        if nbytes == 0 or len(shape) > MAX_DIMENSIONS:
            without_bytes(shape, row)
            out.append(TensorDescriptor(0, shape, row.name, 0, 0))
            return None
        claim = copy = None
        try:
            while (claim := self.loans.claim(nbytes)) is None:
                self._wait_for_room(nbytes)
            copy = write(claim.offset)
            while not self.loans.hold(claim, claim.offset, shape, row.name, out):
                self._wait_for_slot()
        except BaseException:
            if claim is not None:
                self._behind(copy, functools.partial(self.loans.give_back, claim))
            raise
        self.copies[out[-1].sequence] = nbytes
        return copy

    def _expect(self, descriptor: TensorDescriptor, copy: DeviceCopy) -> None:
        """Note that a tensor of the message in the making is not there yet."""
        unfinished = vars(self._this_thread).setdefault("unfinished", Unfinished())
        unfinished.copies.append((descriptor, copy))

    def _write(
        self, offset: int, source: torch.Tensor | np.ndarray[Any, Any], shape: tuple[int, ...], row: DType
    ) -> None:
        """Copy a tensor's content to this offset: by memcpy where possible, since torch would wake its threads."""
        if isinstance(source, torch.Tensor):
            if not (source.is_cpu and source.is_contiguous()) or source.is_conj() or source.is_neg():
                view(self._data, offset, row, shape)[1].copy_(source)
                return
            source = (source if row.numpy is not None else source.view(INTEGERS[row.itemsize])).numpy()
        np.copyto(np.ndarray(shape, row.carrier, self._data, offset), source)

    def _wait_for_slot(self) -> None:
        """Wait until a release slot is free; raises as ``_wait_until``."""
        self._wait_until(lambda: self.loans.has_slot, self._no_slot)

    def _wait_for_room(self, nbytes: int) -> None:
        """Wait until there is a gap that is large enough.

        Raises:
            TensorTooLarge: there can never be one.
            ArenaFull: there was none in time.
        """
        capacity = self.loans.capacity
        if nbytes > capacity:
            raise TensorTooLarge(
                f"a tensor of {size_text(nbytes)} can't fit an arena of {size_text(capacity)}: "
                f"raise arena_bytes to {nbytes + PAGE_BYTES} or more"
            )
        self._wait_until(lambda: self.loans.has_room(nbytes), lambda: self._no_room(nbytes))

    def _wait_until(self, possible: Callable[[], bool], failure: Callable[[], ArenaFull]) -> None:
        """Collect what has ended until something is possible.

        A release is a plain store by the peer, which wakes no one, so this looks again after ever longer pauses. It
        fails at once if the peer holds nothing: no release can come.

        Raises:
            ArenaFull: it did not become possible in time.
        """
        self.loans.collect()
        started = time.monotonic()
        deadline: float = getattr(self._this_thread, "deadline", started + self._claim_timeout_s)
        pause_s = FIRST_PAUSE_S
        try:
            while not possible():
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self.loans.held_by_peer:
                    raise failure()
                if pause_s == FIRST_PAUSE_S:
                    self._counters.count_stall()
                self._check_peer()
                time.sleep(min(pause_s, left_s))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                self.loans.collect()
        finally:
            if pause_s > FIRST_PAUSE_S:
                self._counters.count_stalled(time.monotonic() - started)

    def _no_slot(self) -> ArenaFull:
        return ArenaFull(
            f"{self.loans.held_by_peer} sent tensors are unreleased, as many as the release table has slots; "
            f"{self._peer_facts()}; release results"
        )

    def _no_room(self, nbytes: int) -> ArenaFull:
        return ArenaFull(
            f"requested {size_text(nbytes)}; arena is {size_text(self.loans.capacity)} with "
            f"{size_text(self.loans.largest_gap())} in its largest gap; {self.loans.blocks} blocks held, "
            f"{self._peer_facts()}; drop tensors made by empty(), release results or raise arena_bytes"
        )

    def _peer_facts(self) -> str:
        held = self.loans.held_by_peer
        return (
            f"{held} borrows by the peer, oldest for {self.loans.oldest_s():.1f} s"
            if held
            else ("none of them by the peer")
        )
