"""Where a blocking server's handlers run: in its own thread, or in several others.

A *job* is a call, or one part of a stream. Jobs of one client run one at a time, in the order in which they came.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..channels.backlog import QUEUE_LIMIT, QUEUED_BYTES_LIMIT
from ..errors import LocalProtocolError
from .deferred import Deferred
from .server_connection import IncomingCall, ServerConnection
from .server_stream import ServerStream

logger = logging.getLogger("shmtransport")

Job = IncomingCall | ServerStream
Outcome = bytes | Deferred | ServerStream | BaseException | None
"""Of a job: a reply to send, a result without room, a stream that has begun, what ends ``serve``, or nothing more."""


class _Lane:
    """The jobs of one client that have not begun, and the one that is running."""

    def __init__(self) -> None:
        self.waiting: deque[Job] = deque()
        self.running: Job | None = None
        self.nbytes = 0
        """Of the calls that wait."""

    def add(self, job: Job) -> None:
        """Add a job.

        Raises:
            LocalProtocolError: Too many calls wait.
        """
        if isinstance(job, IncomingCall):
            if len(self.waiting) >= QUEUE_LIMIT or self.nbytes + job.nbytes > QUEUED_BYTES_LIMIT:
                raise LocalProtocolError(
                    f"{len(self.waiting)} calls of this client ({self.nbytes} bytes) wait for their turn, as many as "
                    "may: wait for some of them"
                )
            self.nbytes += job.nbytes
        self.waiting.append(job)

    def take(self) -> Job | None:
        """Take the next job, if it may begin."""
        if self.running is not None or not self.waiting or self.waiting[0].connection.is_saturated:
            return None
        self.running = self.waiting.popleft()
        if isinstance(self.running, IncomingCall):
            self.nbytes -= self.running.nbytes
        return self.running

    def remove(self, unwanted: Callable[[IncomingCall], bool]) -> None:
        """Forget calls that have not begun."""
        self.waiting = deque(job for job in self.waiting if not (isinstance(job, IncomingCall) and unwanted(job)))
        self.nbytes = sum(job.nbytes for job in self.waiting if isinstance(job, IncomingCall))


class Executor(ABC):
    """Runs jobs. Every method is called by the serving thread.

    Args:
        perform: Runs a job; in any thread, and never raises.
        finish: Does what its outcome asks for; in the serving thread.
    """

    def __init__(self, perform: Callable[[Job], Outcome], finish: Callable[[Job, Outcome], None]) -> None:
        self._perform = perform
        self._finish = finish
        self._lanes: dict[ServerConnection, _Lane] = {}

    @abstractmethod
    def add(self, job: Job) -> None:
        """Run a job, now or later.

        Raises:
            LocalProtocolError: Too many calls of this client wait.
        """

    @abstractmethod
    def step(self) -> bool:
        """Go on with jobs that were added before; return whether there was something to do.

        A job of a client for which too many results wait is left until some have been sent.
        """

    def cancel(self, connection: ServerConnection, call_id: int) -> None:
        """Forget a call that has not begun, and mark one that has."""
        lane = self._lanes.get(connection)
        if lane is not None:
            lane.remove(lambda call: call.call_id == call_id)
            self._tidy(connection)
            if isinstance(lane.running, IncomingCall) and lane.running.call_id == call_id:
                lane.running.cancelled = True

    def forget(self, connection: ServerConnection) -> None:
        """Forget all calls of a connection that has ended, except one-way calls.

        These too, if with them more would be left by all clients that have gone than one client may have.
        """
        lane = self._lanes.get(connection)
        if lane is None:
            return
        lane.remove(lambda call: call.is_answered)
        left = [one for owner, one in self._lanes.items() if owner.gone]
        if sum(len(one.waiting) for one in left) > QUEUE_LIMIT or sum(one.nbytes for one in left) > QUEUED_BYTES_LIMIT:
            logger.warning(
                "%d one-way calls of client %d, which has gone, are dropped: too many wait",
                len(lane.waiting),
                connection.connection_id,
            )
            lane.remove(lambda _call: True)
        self._tidy(connection)

    def _tidy(self, connection: ServerConnection) -> None:
        """Forget a lane in which nothing is left."""
        lane = self._lanes.get(connection)
        if lane is not None and lane.running is None and not lane.waiting:
            del self._lanes[connection]

    @property
    def busy(self) -> bool:
        """Whether there are jobs that have not ended."""
        return bool(self._lanes)

    @abstractmethod
    def close(self) -> None:
        """Begin no more jobs; those in progress go on by themselves."""


class InlineExecutor(Executor):
    """Runs calls at once, in the serving thread, and streams' parts in turn between them.

    Only calls of clients whose results wait for room are kept in lanes.
    """

    def __init__(self, perform: Callable[[Job], Outcome], finish: Callable[[Job, Outcome], None]) -> None:
        super().__init__(perform, finish)
        self._streams: deque[ServerStream] = deque()

    def add(self, job: Job) -> None:
        if isinstance(job, ServerStream):
            self._streams.append(job)
        elif job.connection.deferred or job.connection in self._lanes:
            self._lanes.setdefault(job.connection, _Lane()).add(job)
        else:
            self._finish(job, self._perform(job))

    def step(self) -> bool:
        worked = bool(self._lanes) and self._step_lanes()
        for _ in range(len(self._streams)):
            stream = self._streams.popleft()
            if stream.cancelled or not stream.connection.is_saturated:
                self._finish(stream, self._perform(stream))
                return True
            self._streams.append(stream)
        return worked

    def _step_lanes(self) -> bool:
        worked = False
        for connection, lane in list(self._lanes.items()):
            job = lane.take()
            if job is not None:
                self._finish(job, self._perform(job))
                lane.running = None
                worked = True
            self._tidy(connection)
        return worked

    @property
    def busy(self) -> bool:
        return bool(self._streams) or super().busy

    def close(self) -> None:
        pass


class PoolExecutor(Executor):
    """Runs the jobs of different clients at the same time, in threads.

    Args:
        perform: As for ``Executor``.
        finish: As for ``Executor``.
        threads: How many.
        wake: Wakes the serving thread; may be called in any.
    """

    def __init__(
        self,
        perform: Callable[[Job], Outcome],
        finish: Callable[[Job, Outcome], None],
        threads: int,
        wake: Callable[[], None],
    ) -> None:
        super().__init__(perform, finish)
        self._wake = wake
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shmtransport handler")
        self._done: deque[tuple[Job, Outcome]] = deque()

    def add(self, job: Job) -> None:
        lane = self._lanes.setdefault(job.connection, _Lane())
        lane.add(job)
        self._start_next(lane)

    def step(self) -> bool:
        if not self._done:
            started = [self._start_next(lane) for lane in self._lanes.values()]
            return any(started)
        job, outcome = self._done.popleft()
        connection = job.connection
        lane = self._lanes[connection]
        lane.running = None
        self._start_next(lane)
        self._finish(job, outcome)
        self._tidy(connection)
        return True

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start_next(self, lane: _Lane) -> bool:
        job = lane.take()
        if job is not None:
            self._pool.submit(self._run, job)
        return job is not None

    def _run(self, job: Job) -> Any:
        self._done.append((job, self._perform(job)))
        self._wake()
