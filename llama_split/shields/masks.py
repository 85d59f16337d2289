"""One-time masks, and what is needed to take them off: each is handed out once, also over the end of a process.

A mask for a row of a matrix's arguments is k numbers, uniform modulo 2³²; its *term* is the product of the matrix with
it, m numbers, which a dealer computes beforehand. Masks are the key stream of AES-256 in counter mode. Each block of 16
masks has a key of its own, drawn from the system's generator; each matrix has its own part of the counter's range.

A store has two *pools*, one for the matrices of the layers and one for the output matrix, which fewer rows go through.
It lies in anonymous memory or in a file:

    offset   0  magic                 8 bytes
             8  fingerprint           32 bytes: of the model
            40  pool of the layers    capacity, leased: two uint64
            56  pool of the output matrix, the same
          4096  keys of the layers' pool, 32 bytes a block; keys of the other
           ...  for each matrix of both pools: its terms, int32 [capacity, m]; each array begins at a multiple of 4096

A file begins with its magic once it is complete.

Rules that it keeps: before masks are handed out, the file tells that their blocks are leased, and is synchronised; if
that fails, nothing is handed out any longer. What was leased is never handed out by another process: whatever of it was
not used is lost. Terms are wiped when they are handed out, keys when all masks of their block are, and what a killed
process left of both when the file is opened again. A key that was wiped is never used. One process at a time has the
file open, and a forked child of it can't use it.

Shape suffixes: N rows, k input width, m output width.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from ..checkpoint.quantised import MatrixKey, Widths
from ..errors import LlamaSplitError, MasksExhausted, MissingPackage

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

BLOCK_ROWS = 16
"""Masks that share a key, are leased together, and are lost together when a process is killed."""

_MAGIC = b"lsmasks\x01"
_KEY_BYTES = 32
_CIPHER_BYTES = 16
_PAGE = 4096
_HEAD = struct.Struct("<8s32s")
_POOL = struct.Struct("<QQ")
_LEASED = struct.Struct("<Q")


class Taken(NamedTuple):
    """Masks and their terms, for as many rows as were asked for."""

    mask_Nk: torch.Tensor
    term_Nm: torch.Tensor

    def join(self, other: Taken) -> Taken:
        """These rows, then the others."""
        return Taken(torch.cat((self.mask_Nk, other.mask_Nk)), torch.cat((self.term_Nm, other.term_Nm)))


class _Pool:
    """The masks of several matrices that the same rows go through."""

    def __init__(
        self,
        buffer: mmap.mmap,
        header: int,
        keys: int,
        terms: Mapping[MatrixKey, int],
        widths: Mapping[MatrixKey, Widths],
        synchronise: Callable[[], None],
    ) -> None:
        self.capacity: int
        self.leased: int
        self.capacity, self.leased = _POOL.unpack_from(buffer, header)
        self._header = header
        self._buffer = buffer
        self._synchronise = synchronise
        view = memoryview(buffer)
        blocks = self.capacity // BLOCK_ROWS
        self.keys = np.frombuffer(view, np.uint8, blocks * _KEY_BYTES, keys).reshape(blocks, _KEY_BYTES)
        self.terms = {
            matrix: np.frombuffer(view, np.int32, self.capacity * widths[matrix].output, start).reshape(
                self.capacity, -1
            )
            for matrix, start in terms.items()
        }
        self.next = dict.fromkeys(terms, self.leased)  # for each matrix, the first mask that was not handed out

    def lease(self, end: int) -> None:
        """Have the file tell that all masks before this one are used, whatever becomes of this process."""
        leased = min(-(-end // BLOCK_ROWS) * BLOCK_ROWS, self.capacity)
        _LEASED.pack_into(self._buffer, self._header + _LEASED.size, leased)
        self._synchronise()
        self.leased = leased

    def level(self) -> None:
        """Use up what some matrices have left of the blocks that others are done with."""
        end = max(self.next.values(), default=0)
        for matrix, first in self.next.items():
            self.next[matrix] = end
            self.terms[matrix][first:end] = 0
        self.wipe(end)

    def wipe(self, end: int) -> None:
        """Wipe the keys of all whole blocks before this mask; those without a key were wiped before."""
        done = first = end // BLOCK_ROWS
        while first and self.keys[first - 1].any():
            first -= 1
        if first < done:
            self._synchronise()  # the terms first: a key tells that there is something to wipe
            self.keys[first:done] = 0

    def wipe_leased(self) -> None:
        """Wipe what this or another process has leased; blocks without a key were wiped before."""
        first = self.leased // BLOCK_ROWS
        while first and self.keys[first - 1].any():
            first -= 1
        for terms in self.terms.values():
            terms[first * BLOCK_ROWS : self.leased] = 0
        self.wipe(self.leased)


class MaskStore:
    """The masks of one model; ``in_memory``, ``in_file`` and ``open`` make one.

    Args:
        buffer: of the layout above, its header written.
        widths: of each matrix.
        layers: the matrices that have the first pool; the others have the second.
        descriptor: of the file, which is closed with the store. None: there is none.
    """

    def __init__(self, buffer: mmap.mmap, widths: Mapping[MatrixKey, Widths], descriptor: int | None = None) -> None:
        _ciphers()
        self._buffer = buffer
        self.widths = dict(widths)
        self._descriptor = descriptor
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._failure = ""
        """Why nothing can be handed out any longer."""
        self._places = {matrix: place for place, matrix in enumerate(self.widths)}
        layout = _Layout(self.widths, *(_POOL.unpack_from(buffer, at)[0] for at in _POOL_HEADERS))
        self._pools = [
            _Pool(buffer, header, keys, {each: layout.terms[each] for each in matrices}, self.widths, self._synchronise)
            for header, keys, matrices in zip(_POOL_HEADERS, layout.keys, layout.matrices, strict=True)
        ]
        self._pool_of = {matrix: pool for pool in self._pools for matrix in pool.terms}

    @staticmethod
    def in_memory(widths: Mapping[MatrixKey, Widths], rows: int) -> MaskStore:
        """A store that ends with this process, for this many rows of each matrix; to be filled by a dealer."""
        rows = _whole_blocks(rows)
        buffer = mmap.mmap(-1, _Layout(widths, rows, rows).nbytes)
        _write_header(buffer, "", rows, rows)
        return MaskStore(buffer, widths)

    @staticmethod
    @contextlib.contextmanager
    def in_file(
        path: Path, fingerprint: str, widths: Mapping[MatrixKey, Widths], tokens: int, logits: int
    ) -> Iterator[MaskStore]:
        """A store in a new file, filled by a dealer within the block; complete when that ends without an error.

        Raises:
            LlamaSplitError: there is a file of this name, or no room for it.
        """
        tokens, logits = _whole_blocks(tokens), _whole_blocks(logits)
        nbytes = _Layout(widths, tokens, logits).nbytes
        with contextlib.ExitStack() as undo:
            with _writing(path, nbytes):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                undo.callback(path.unlink, missing_ok=True)
                undo.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.posix_fallocate(descriptor, 0, nbytes)
                buffer = mmap.mmap(descriptor, nbytes)
            _write_header(buffer, fingerprint, tokens, logits)
            store = MaskStore(buffer, widths)
            undo.callback(store.close)
            yield store
            with _writing(path, nbytes):
                buffer.flush()
                _HEAD.pack_into(buffer, 0, _MAGIC, fingerprint.encode())
                buffer.flush()
                os.fsync(descriptor)
            undo.pop_all()
        store.close()
        os.close(descriptor)

    @staticmethod
    def open(path: Path, fingerprint: str, widths: Mapping[MatrixKey, Widths]) -> MaskStore:
        """Open a file of masks for this model.

        Raises:
            LlamaSplitError: it can't be read, is another model's, in use, or readable by other users.
        """
        with contextlib.ExitStack() as undo:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                undo.callback(os.close, descriptor)
                found = os.fstat(descriptor)
                if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                    raise LlamaSplitError(f"{path} can be read by other users: deal new masks, or chmod 600 it")
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                buffer = mmap.mmap(descriptor, found.st_size) if found.st_size >= _PAGE else None
            except BlockingIOError:
                raise LlamaSplitError(f"{path} is in use by another process: each needs masks of its own") from None
            except OSError as error:
                raise LlamaSplitError(f"{path} can't be opened: {error.strerror}") from error
            magic, model = (b"", b"") if buffer is None else _HEAD.unpack_from(buffer)
            if buffer is None or magic != _MAGIC:
                raise LlamaSplitError(f"{path} is no complete file of masks: remove it, and `llama-split deal` again")
            if model.decode(errors="replace") != fingerprint:
                raise LlamaSplitError(f"the masks in {path} are for another model: deal some for this one")
            pools = [_POOL.unpack_from(buffer, at) for at in _POOL_HEADERS]
            if any(capacity % BLOCK_ROWS or leased % BLOCK_ROWS or leased > capacity for capacity, leased in pools):
                raise LlamaSplitError(f"{path} is damaged: its header is wrong")
            if _Layout(widths, *(capacity for capacity, _ in pools)).nbytes != found.st_size:
                raise LlamaSplitError(f"{path} is damaged: its size is not what its header says")
            store = MaskStore(buffer, widths, descriptor)
            store.wipe()
            undo.pop_all()
        return store

    @property
    def left(self) -> int:
        """How many rows can still go through all matrices of the first pool that has any; none once it is closed."""
        for pool in self._pools:
            if pool.next:
                return pool.capacity - max(pool.next.values())
        return 0

    @property
    def is_used_up(self) -> bool:
        """True if no mask is left for any matrix."""
        return all(pool.capacity == last for pool in self._pools for last in pool.next.values())

    def take(self, matrix: MatrixKey, rows: int, *, partly: bool = False) -> Taken:
        """Hand out masks that were never handed out before.

        Args:
            matrix: what they are for.
            rows: how many.
            partly: hand out what there is, if that is fewer.

        Raises:
            MasksExhausted: there are fewer, or the store is closed.
            LlamaSplitError: the file can't be synchronised, or is damaged.
        """
        if os.getpid() != self._process:
            raise MasksExhausted("a forked process can't use its parent's masks: open a model of its own")
        with self._lock:
            if self._failure:
                raise MasksExhausted(self._failure)
            pool = self._pool_of[matrix]
            first = pool.next[matrix]
            left = pool.capacity - first
            if rows > left and not partly:
                raise MasksExhausted(
                    f"{rows} masks for {matrix[0].name} are needed and {left} are left: deal more with `llama-split "
                    "deal`; none is used twice"
                )
            end = first + min(rows, left)
            if end > pool.leased:
                pool.lease(end)
            mask_Nk = self.masks(matrix, first, end)
            held = pool.terms[matrix][first:end]
            term_Nm = torch.from_numpy(held.copy())
            pool.next[matrix] = end
            held[:] = 0
            if end // BLOCK_ROWS > first // BLOCK_ROWS:
                pool.wipe(min(pool.next.values()))
            return Taken(mask_Nk, term_Nm)

    def _synchronise(self) -> None:
        try:
            self._buffer.flush()
        except OSError as error:  # a second try may succeed without having written what this one lost
            self._failure = "the masks' file could not be synchronised: nothing of it is used any longer"
            raise LlamaSplitError(f"{self._failure} ({error.strerror})") from error

    def level(self) -> None:
        """After a forward that has failed: use up the masks that only some matrices have used."""
        if os.getpid() != self._process:
            return
        with self._lock:
            for pool in self._pools:
                pool.level()

    def masks(self, matrix: MatrixKey, first: int, end: int) -> torch.Tensor:
        """Masks of a matrix by their places; the dealer computes their terms."""
        width, pool = self.widths[matrix].input, self._pool_of[matrix]
        blocks_a_row = -(-4 * width // _CIPHER_BYTES)
        stream = np.empty((end - first, blocks_a_row * _CIPHER_BYTES), np.uint8)
        at = first
        while at < end:
            block, within = divmod(at, BLOCK_ROWS)
            if not pool.keys[block].any():
                raise LlamaSplitError("the masks are damaged: a key is missing; deal new ones")
            stop = min((block + 1) * BLOCK_ROWS, end)
            nonce = struct.pack(">QQ", self._places[matrix], within * blocks_a_row)
            _key_stream(pool.keys[block], nonce, stream[at - first : stop - first])
            at = stop
        return torch.from_numpy(stream.view(np.int32)[:, :width])

    def terms(self, matrix: MatrixKey) -> torch.Tensor:
        """Memory for the terms of all masks of a matrix, int32 [capacity, m], for the dealer."""
        return torch.from_numpy(self._pool_of[matrix].terms[matrix])

    def draw_keys(self) -> None:
        """Draw all keys; the dealer begins so."""
        for pool in self._pools:
            pool.keys[:] = np.frombuffer(os.urandom(pool.keys.size), np.uint8).reshape(pool.keys.shape)

    def wipe(self) -> None:
        """Wipe what was leased; what is left of it can't be used."""
        for pool in self._pools:
            pool.wipe_leased()

    def close(self) -> None:
        """Wipe what was leased, and close the file."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._failure = self._failure or "these masks were closed"
            try:
                self.wipe()
            finally:
                self._give_back()

    def _give_back(self) -> None:
        self._pools.clear()
        self._pool_of.clear()
        with contextlib.suppress(BufferError):  # a result of ``terms`` is still in use
            self._buffer.close()
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # the mapping may have a descriptor of its own
            os.close(self._descriptor)
            self._descriptor = None


_POOL_HEADERS = (_HEAD.size, _HEAD.size + _POOL.size)


class _Layout:
    """Where everything is in a store of these capacities."""

    def __init__(self, widths: Mapping[MatrixKey, Widths], tokens: int, logits: int) -> None:
        layers = [matrix for matrix in widths if matrix[0].per_layer]
        others = [matrix for matrix in widths if not matrix[0].per_layer]
        self.matrices = (layers, others)
        self._end = _PAGE
        capacities = (tokens, logits)
        self.keys = tuple(self._place(one // BLOCK_ROWS * _KEY_BYTES) for one in capacities)
        self.terms = {
            matrix: self._place(4 * capacity * widths[matrix].output)
            for capacity, matrices in zip(capacities, self.matrices, strict=True)
            for matrix in matrices
        }
        self.nbytes = self._end

    def _place(self, nbytes: int) -> int:
        start = self._end
        self._end += -(-nbytes // _PAGE) * _PAGE
        return start


@contextlib.contextmanager
def _writing(path: Path, nbytes: int) -> Iterator[None]:
    """Put into words why a new file can't be written."""
    try:
        yield
    except FileExistsError:
        raise LlamaSplitError(
            f"{path} exists, and is not replaced: its masks may not have been used up, or another process is dealing "
            "them"
        ) from None
    except OSError as error:
        raise LlamaSplitError(f"{path} can't be written with {nbytes} bytes: {error.strerror}") from error


def _write_header(buffer: mmap.mmap, fingerprint: str, *capacities: int) -> None:
    _HEAD.pack_into(buffer, 0, b"", fingerprint.encode())
    for at, capacity in zip(_POOL_HEADERS, capacities, strict=True):
        _POOL.pack_into(buffer, at, capacity, 0)


def _whole_blocks(rows: int) -> int:
    return -(-rows // BLOCK_ROWS) * BLOCK_ROWS


def _key_stream(key: Bytes, nonce: bytes, out: Bytes) -> None:
    """Write AES-256's key stream from this counter on."""
    ciphers = _ciphers()
    encryptor = ciphers.Cipher(ciphers.algorithms.AES(key.tobytes()), ciphers.modes.CTR(nonce)).encryptor()
    encryptor.update_into(bytes(out.size), out.data.cast("B"))


def _ciphers() -> ModuleType:
    """The module of the package ``cryptography``, an extra.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        return import_module("cryptography.hazmat.primitives.ciphers")
    except ModuleNotFoundError:
        raise MissingPackage.named("cryptography") from None
