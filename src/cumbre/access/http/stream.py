"""From a thread that writes a document to a response that is sent piece by piece.

The thread runs in a lane. Every query starts in the quick lane; one that lives longer than a second gives its
place there to others and goes on in the slow lane. So a short query hardly waits behind long ones; when the slow
lane is full too, and others wait, a query that had its quick place for some seconds ends with a word about
asynchronous jobs. Not before: on a busy machine short queries last longer than a second, and waiting is better than
failing.

All threads share one interpreter. What is long gives way, between its blocks, to what is short: while queries of the
quick lane run, one of the slow lane works a tenth of the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request

from cumbre.access.http.base import BusyError

HELD_BYTES = 1 << 14
BLOCKS_AHEAD = 8
QUICK_S = 1.0
PATIENCE_S = 5.0
QUEUE_S = 30.0
GIVEN_S = 1.0
"""Longest that a long query stands back before one block."""
LEFT_S = 0.25
"""How often a waiting answer looks whether its client is still there."""


class Place:
    """What a query holds while it is answered.

    Attributes
    ----------
    pushed_out
        Set when its work was stopped for want of a place.
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self.pushed_out = threading.Event()
        self.is_slow = False
        self._since = time.monotonic()

    def give_way(self) -> None:
        """Stand back nine times as long as it worked, a second at most, and only while short queries run."""
        if self.is_slow:
            self._lanes.wait_for_quick(min(9 * (time.monotonic() - self._since), GIVEN_S))
        self._since = time.monotonic()


class Lanes:
    """Places for queries that are answered at once.

    Parameters
    ----------
    quick, slow
        Queries at a time in each lane.
    """

    def __init__(self, quick: int = 8, slow: int = 8) -> None:
        self._quick, self._slow = threading.Semaphore(quick), threading.Semaphore(slow)
        self._lock = threading.Lock()
        self._waiting = 0
        self._running_quick = 0
        self._quick_ended = threading.Condition()

    def wait_for_quick(self, at_most_s: float) -> None:
        """Wait until no query of the quick lane runs."""
        with self._quick_ended:
            self._quick_ended.wait_for(lambda: self._running_quick == 0, at_most_s)

    def _count_quick(self, change: int) -> None:
        with self._quick_ended:
            self._running_quick += change
            if self._running_quick == 0:
                self._quick_ended.notify_all()

    @contextmanager
    def place(self, cancel: Callable[[], None]) -> Iterator[Place]:
        """Hold a place while the block runs.

        Parameters
        ----------
        cancel
            Stops the block's work when it is long, the slow lane is full, and others wait.

        Yields
        ------
        Place
            Tells when the work was stopped for want of a place.

        Raises
        ------
        BusyError
            No place came free in time.
        """
        self._enter()
        lock, held, place, over = threading.Lock(), self._quick, Place(self), threading.Event()
        self._count_quick(1)

        def promote() -> None:
            nonlocal held
            begin = time.monotonic()
            while not over.is_set():
                with lock:
                    if over.is_set():
                        return
                    if self._slow.acquire(blocking=False):
                        held, place.is_slow = self._slow, True
                        self._quick.release()
                        self._count_quick(-1)
                        return
                if self._waiting and time.monotonic() - begin > PATIENCE_S - QUICK_S:
                    place.pushed_out.set()
                    cancel()
                    return
                over.wait(0.2)

        timer = threading.Timer(QUICK_S, promote)
        timer.daemon = True
        timer.start()
        try:
            yield place
        finally:
            timer.cancel()
            with lock:
                over.set()
                held.release()
                if not place.is_slow:
                    self._count_quick(-1)

    def _enter(self) -> None:
        """Take a place in the quick lane."""
        if self._quick.acquire(blocking=False):
            return
        with self._lock:
            self._waiting += 1
        try:
            if not self._quick.acquire(timeout=QUEUE_S):
                raise BusyError("many queries are running; try again in a few seconds")
        finally:
            with self._lock:
                self._waiting -= 1


class Pipe:
    """Bytes written by one thread, read by the event loop; the writer waits when the reader is slow.

    The first bytes are held back until there are some kilobytes of them or the writer ended, so that an error at
    the start can still become an answer of its own.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._room = threading.Semaphore(BLOCKS_AHEAD)
        self._started = asyncio.Event()
        self._held: list[bytes] = []
        self._held_bytes = 0
        self.flushed = False
        self.gone = threading.Event()
        """Set when the client went away."""

    # writer

    def write(self, block: bytes | bytearray | memoryview) -> int:
        """Pass a block on.

        Raises
        ------
        BrokenPipeError
            The client is gone.
        """
        piece = bytes(block)
        if self.flushed:
            self._send(piece)
            return len(piece)
        self._held.append(piece)
        self._held_bytes += len(piece)
        if self._held_bytes >= HELD_BYTES:
            self._flush()
        return len(piece)

    def _flush(self) -> None:
        held, self._held = b"".join(self._held), []
        self.flushed = True
        if held:
            self._send(held)
        self._tell(self._started.set)

    def _send(self, block: bytes) -> None:
        while not self._room.acquire(timeout=0.5):
            if self.gone.is_set():
                break
        if self.gone.is_set():
            raise BrokenPipeError("the client is gone")
        self._tell(lambda: self._queue.put_nowait(block))

    def finish(self) -> None:
        """No more blocks come."""
        if not self.flushed:
            with contextlib.suppress(BrokenPipeError):
                self._flush()
        self._tell(lambda: self._queue.put_nowait(None))

    def drop(self) -> None:
        """Forget what is held back: an answer of its own takes its place."""
        self._held = []
        self._tell(self._started.set)

    def _tell(self, call: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the server is closing its loop
            self._loop.call_soon_threadsafe(call)

    # reader

    async def started(self, wait_s: float) -> bool:
        """Wait for the first bytes, or the end; False when there was neither."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._started.wait(), wait_s)
        return self._started.is_set()

    async def blocks(self, ended: Callable[[], None]) -> AsyncIterator[bytes]:
        """All blocks; ``ended`` is called when the client leaves or everything was sent."""
        try:
            while (block := await self._queue.get()) is not None:
                self._room.release()
                yield block
        finally:
            self.gone.set()
            ended()


async def start_writing(
    pool: Executor, pipe: Pipe, work: Callable[[Pipe], None], request: Request, stop: Callable[[], None]
) -> asyncio.Future[None]:
    """Run ``work`` in the pool and wait until the pipe begins or the work failed.

    Parameters
    ----------
    stop
        Called when the client leaves meanwhile.

    Raises
    ------
    CumbreError
        What the work raised before anything was sent.
    ClientDisconnect
        The client left.
    """

    def run() -> None:
        try:
            work(pipe)
        except BaseException:
            if not pipe.flushed:
                pipe.drop()
                raise
        pipe.finish()

    future = asyncio.get_running_loop().run_in_executor(pool, run)
    while not await pipe.started(LEFT_S):
        if await request.is_disconnected():
            pipe.gone.set()
            stop()
            future.add_done_callback(lambda done: done.exception())  # nobody is left to hear of it
            raise ClientDisconnect
    if not pipe.flushed:
        await future
    return future
