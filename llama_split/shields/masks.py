"""One-time masks, and what is needed to take them off: each is handed out once, also over the end of a process.

A mask for a row of a matrix's arguments is k numbers, uniform modulo 2³²; its *term* is the product of the matrix with
it, m numbers, which a dealer computes beforehand. Masks are the key stream of AES-256 in counter mode. Each block of 16
masks has a key of its own, drawn from the system's generator; each matrix has its own part of the counter's range.

A store has two pools (``mask_pool``), one for the matrices of the layers and one for the output matrix, which fewer
rows go through. It lies in anonymous memory or in a file.

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
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from ..checkpoint.matrices import MatrixKey
from ..checkpoint.quantised import Widths
from ..errors import LlamaSplitError, MasksExhausted, MissingPackage
from .mask_pool import BLOCK_ROWS, HEAD, MAGIC, PAGE, POOL, POOL_HEADERS, Bytes, Layout, Pool, write_header

CLOSED = "these masks were closed"
_CIPHER_BYTES = 16


class Taken(NamedTuple):
    """Masks and their terms, for as many rows as were asked for."""

    mask_Nk: torch.Tensor
    term_Nm: torch.Tensor

    def join(self, other: Taken) -> Taken:
        """These rows, then the others."""
        return Taken(torch.cat((self.mask_Nk, other.mask_Nk)), torch.cat((self.term_Nm, other.term_Nm)))


class MaskStore:
    """The masks of one model; ``in_memory``, ``in_file`` and ``open`` make one.

    Args:
        buffer: its header is written.
        widths: of each matrix.
        descriptor: of the file, which is closed with the store. None: there is none.
    """

    def __init__(self, buffer: mmap.mmap, widths: Mapping[MatrixKey, Widths], descriptor: int | None = None) -> None:
        self._ciphers = _ciphers()
        self._buffer = buffer
        self.widths = dict(widths)
        self._descriptor = descriptor
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._failure = ""
        """Why nothing can be handed out any longer."""
        self._places = {matrix: place for place, matrix in enumerate(self.widths)}
        layout = Layout(self.widths, *(POOL.unpack_from(buffer, at)[0] for at in POOL_HEADERS))
        self._pools = [
            Pool(buffer, header, keys, {each: layout.terms[each] for each in matrices}, self.widths, self._synchronise)
            for header, keys, matrices in zip(POOL_HEADERS, layout.keys, layout.matrices, strict=True)
        ]
        self._pool_of = {matrix: pool for pool in self._pools for matrix in pool.terms}

    @staticmethod
    def in_memory(widths: Mapping[MatrixKey, Widths], rows: int) -> MaskStore:
        """A store that ends with this process, for this many rows of each matrix; to be filled by a dealer."""
        rows = _whole_blocks(rows)
        buffer = mmap.mmap(-1, Layout(widths, rows, rows).nbytes)
        write_header(buffer, "", rows, rows)
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
        nbytes = Layout(widths, tokens, logits).nbytes
        with contextlib.ExitStack() as undo:
            with _writing(path, nbytes):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                undo.callback(path.unlink, missing_ok=True)
                undo.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.posix_fallocate(descriptor, 0, nbytes)
                buffer = mmap.mmap(descriptor, nbytes)
            write_header(buffer, fingerprint, tokens, logits)
            store = MaskStore(buffer, widths)
            undo.callback(store.close)
            yield store
            with _writing(path, nbytes):
                buffer.flush()
                HEAD.pack_into(buffer, 0, MAGIC, fingerprint.encode())
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
                buffer = mmap.mmap(descriptor, found.st_size) if found.st_size >= PAGE else None
            except BlockingIOError:
                raise LlamaSplitError(f"{path} is in use by another process: each needs masks of its own") from None
            except OSError as error:
                raise LlamaSplitError(f"{path} can't be opened: {error.strerror}") from error
            magic, model = (b"", b"") if buffer is None else HEAD.unpack_from(buffer)
            if buffer is None or magic != MAGIC:
                raise LlamaSplitError(f"{path} is no complete file of masks: remove it, and `llama-split deal` again")
            if model.decode(errors="replace") != fingerprint:
                raise LlamaSplitError(f"the masks in {path} are for another model: deal some for this one")
            pools = [POOL.unpack_from(buffer, at) for at in POOL_HEADERS]
            if any(capacity % BLOCK_ROWS or leased % BLOCK_ROWS or leased > capacity for capacity, leased in pools):
                raise LlamaSplitError(f"{path} is damaged: its header is wrong")
            if Layout(widths, *(capacity for capacity, _ in pools)).nbytes != found.st_size:
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
        check_process(self._process)
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
            _key_stream(self._ciphers, pool.keys[block], nonce, stream[at - first : stop - first])
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
            self._failure = self._failure or CLOSED
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


def check_process(process: int) -> None:
    """Refuse masks to another process than theirs.

    Raises:
        MasksExhausted: this is one.
    """
    if os.getpid() != process:
        raise MasksExhausted("a forked process can't use its parent's masks: open a model of its own")


def _whole_blocks(rows: int) -> int:
    return -(-rows // BLOCK_ROWS) * BLOCK_ROWS


def _key_stream(ciphers: ModuleType, key: Bytes, nonce: bytes, out: Bytes) -> None:
    """Write AES-256's key stream from this counter on."""
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
