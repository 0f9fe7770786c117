"""Where jobs run: Dask distributed, on this machine or at an address; or this process."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from cumbre.core.errors import TransientError
from cumbre.core.memory import ENVIRONMENT
from cumbre.orchestration.models import LOST, JobResult
from cumbre.orchestration.task import THREAD_VARIABLES, resolve, run_task

log = logging.getLogger(__name__)

# Dask's number is larger for what is more urgent, ours smaller.
_DASK_PRIORITY = 1000
START_TIMEOUT_S = 60.0
REFILL_S = 5.0
"""Real seconds for which workers may be missing before the cluster is looked after."""
RESTART_S = 120.0
"""Real seconds that a killed worker may take to be there again: a loaded machine starts a process slowly."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A try that ended, or whose worker died."""

    key: str
    result: JobResult


class ComputeEngine(Protocol):
    """Runs functions named by path on workers, the urgent first."""

    def submit(
        self, key: str, function: str, payload: dict[str, Any], *, priority: int, worker: str = ""
    ) -> None:
        """Start one try, if possible on one of :meth:`workers`; smaller priority goes first.

        ``key`` is told again in its :class:`Completion`.
        """

    def completed(self, timeout_s: float) -> list[Completion]:
        """Tries that ended since the last call; waits at most ``timeout_s`` real seconds for the first."""

    def cancel(self, key: str) -> None:
        """Drop a try that has not begun; one that runs may still end."""

    def kill(self, key: str, worker: str) -> None:
        """Drop a try and end the process that runs it; another one takes its place. Does not wait."""

    def workers(self) -> list[str]:
        """Names of the workers, in the order of their slots."""

    def close(self) -> None:
        """Stop the workers that this engine started."""


class InlineEngine:
    """Runs one job at a time in this process, when results are asked for. No isolation; for one-off commands."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, str, str, dict[str, Any]]] = []
        self._count = 0

    def submit(
        self, key: str, function: str, payload: dict[str, Any], *, priority: int, worker: str = ""
    ) -> None:
        """Queue one try."""
        del worker
        self._count += 1
        self._waiting.append((priority, self._count, key, function, payload))

    def completed(self, timeout_s: float) -> list[Completion]:
        """Run the most urgent job that waits."""
        del timeout_s
        if not self._waiting:
            return []
        self._waiting.sort(key=lambda item: item[:2])
        _, _, key, function, payload = self._waiting.pop(0)
        return [Completion(key, JobResult(**run_task(function, payload)))]

    def cancel(self, key: str) -> None:
        """Forget a waiting job."""
        self._waiting = [item for item in self._waiting if item[2] != key]

    def kill(self, key: str, worker: str) -> None:
        """Forget a waiting job; none runs between two calls."""
        del worker
        self.cancel(key)

    def workers(self) -> list[str]:
        """One worker: this process."""
        return ["inline"]

    def close(self) -> None:
        """Nothing to stop."""
        self._waiting.clear()


def _warm(function: str, payload: dict[str, Any]) -> None:
    """Run on each worker when it starts, also after a restart by its nanny."""
    from cumbre.orchestration.task import one_thread

    one_thread()
    if function:
        resolve(function)(payload)


class DaskEngine:
    """Dask distributed: processes of one thread each, restarted by their nannies.

    Parameters
    ----------
    address
        Scheduler of a running cluster; None starts a local one that ends with this process, however it ends.
    n_workers
        Worker processes of the local cluster.
    warm_up, warm_payload
        ``package.module:function`` run on each worker when it starts (imports, compiled kernels), and what
        it is given (``{}`` by default).
    nice
        By how much its workers stand back behind other processes of their machine.

    Raises
    ------
    TransientError
        The cluster does not answer.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        n_workers: int = 2,
        warm_up: str = "",
        warm_payload: dict[str, Any] | None = None,
        nice: int = 0,
    ) -> None:
        import dask
        from distributed import Client, LocalCluster

        for name in [n for n in logging.root.manager.loggerDict if n.split(".")[0] == "distributed"]:
            logging.getLogger(name).setLevel(logging.WARNING)  # importing Dask set them to INFO
        # A lost worker is our matter: each loss is an attempt in the jobs table, none is repeated silently.
        dask.config.set(
            {
                "distributed.scheduler.allowed-failures": 0,
                "distributed.nanny.pre-spawn-environ": dict.fromkeys(THREAD_VARIABLES, "1") | ENVIRONMENT,
                "distributed.worker.daemon": True,
                "distributed.deploy.lost-worker-timeout": RESTART_S,
                "distributed.admin.system-monitor.gil.enabled": False,
            }
        )
        self._ended: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._futures: dict[str, Any] = {}
        self._wanted: dict[str, str] = {}
        self._cluster: Any = None
        self._n_workers, self._short_since, self._next_look = n_workers, math.inf, 0.0
        try:
            if address is None:
                self._cluster = LocalCluster(
                    n_workers=n_workers,
                    threads_per_worker=1,
                    processes=True,
                    dashboard_address="127.0.0.1:0",  # the default port may be taken
                    memory_limit=None,
                    silence_logs=logging.ERROR,
                )
            self._client: Any = Client(
                self._cluster or address, timeout=START_TIMEOUT_S, set_as_default=False
            )
            self._client.wait_for_workers(1, timeout=START_TIMEOUT_S)
            self._client.register_plugin(
                _warm_plugin(warm_up, warm_payload or {}, nice), name="cumbre-warm-up"
            )
        except (OSError, TimeoutError) as error:
            self.close()
            raise TransientError(f"compute cluster {address or 'on this machine'}: {error}") from error
        self._slots: deque[str] = deque()
        self._slots_read = -math.inf

    def submit(
        self, key: str, function: str, payload: dict[str, Any], *, priority: int, worker: str = ""
    ) -> None:
        """Send one try to the cluster, if possible to that worker."""
        where = {"workers": [worker], "allow_other_workers": True} if worker else {}
        future = self._client.submit(
            run_task, function, payload, key=key, pure=False, retries=0,
            priority=_DASK_PRIORITY - priority, **where,
        )  # fmt: skip
        self._futures[key], self._wanted[key] = future, worker
        future.add_done_callback(lambda done, key=key: self._ended.put((key, done)))

    def completed(self, timeout_s: float) -> list[Completion]:
        """Gather what ended; a dead worker gives the outcome ``WorkerLost``."""
        found: list[Completion] = []
        if self._futures and time.monotonic() >= self._next_look:
            # Nobody else asks while a try is thought to run on a worker that is gone.
            self._next_look = time.monotonic() + REFILL_S
            with contextlib.suppress(OSError, TimeoutError):
                self.workers()
                found += self._stranded()
        while True:
            try:
                key, future = self._ended.get(timeout=timeout_s if not found else 0)
            except (queue.Empty, ValueError):
                return found
            if self._futures.get(key) is not future:
                continue  # cancelled, or submitted again
            del self._futures[key]
            self._wanted.pop(key, None)
            found.append(Completion(key, self._result(future)))
            if found[-1].result.outcome == LOST:
                self._slots_read = -math.inf

    def _stranded(self) -> list[Completion]:
        """Tries that were meant for a worker that had just gone, when there was no other: Dask keeps them for ever."""
        gone = [key for key, worker in self._wanted.items() if worker and worker not in self._slots]
        if not gone or not self._slots:
            return []
        begun = {key for keys in self._client.processing().values() for key in keys}
        stranded = [key for key in gone if key not in begun and self._futures[key].status == "pending"]
        for key in stranded:
            self.cancel(key)
        return [
            Completion(key, JobResult(LOST, "its worker ended before it began", may_retry=True))
            for key in stranded
        ]

    @staticmethod
    def _result(future: Any) -> JobResult:
        if future.status == "finished":
            return JobResult(**future.result())
        if future.status == "error":
            error = future.exception()
            lost = type(error).__name__ in ("KilledWorker", "CancelledError", "FutureCancelledError")
            return JobResult(
                LOST if lost else "Failed",
                f"{type(error).__name__}: {error}",
                may_retry=lost or isinstance(error, OSError),
            )
        return JobResult(LOST, f"the cluster gave the job up ({future.status})", may_retry=True)

    def cancel(self, key: str) -> None:
        """Ask the cluster to drop it."""
        future = self._futures.pop(key, None)
        self._wanted.pop(key, None)
        if future is not None:
            future.cancel()

    def kill(self, key: str, worker: str) -> None:
        """Have the worker's nanny end it and start another, in the background."""
        self.cancel(key)
        threading.Thread(target=self._end, args=(worker,), daemon=True).start()

    def _end(self, worker: str) -> None:
        try:
            self._client.run(_end_worker, workers=[worker], nanny=True, on_error="return")
        except (OSError, TimeoutError, ValueError, KeyError, RuntimeError) as error:
            log.warning("worker %s could not be ended: %s: %s", worker, type(error).__name__, error)

    def workers(self) -> list[str]:
        """Addresses of the live workers, in the order of their names (looked up at most once a second)."""
        now = time.monotonic()
        if not self._slots or now - self._slots_read > 1.0:
            info = self._client.scheduler_info(n_workers=-1)["workers"]
            ordered = sorted(info, key=lambda address: str(info[address].get("name", address)))
            self._slots, self._slots_read = deque(ordered), now
            self._look_after(now)
        return list(self._slots)

    def _look_after(self, now: float) -> None:
        """Fill gaps of the local cluster: a worker cut off from its scheduler, or started too slowly, ends for good."""
        if self._cluster is None or len(self._slots) >= self._n_workers:
            self._short_since = math.inf
            return
        self._short_since = min(self._short_since, now)
        if now - self._short_since >= REFILL_S:
            self._short_since = now
            self._cluster.loop.add_callback(self._refill)

    def _refill(self) -> None:
        """Called on the cluster's loop; workers that are being restarted are left alone."""
        from distributed.core import Status

        for name, nanny in list(self._cluster.workers.items()):
            if nanny.status in (Status.closed, Status.failed):
                log.warning("worker %s ended for good; another one is started in its place", name)
                del self._cluster.workers[name]
        self._cluster.scale(self._n_workers)

    def pids(self) -> dict[str, int]:
        """Process id of each worker by address."""
        return dict(self._client.run(_pid))

    def close(self) -> None:
        """Stop the client, and the cluster when it is ours."""
        for thing in (getattr(self, "_client", None), self._cluster):
            if thing is not None:
                with contextlib.suppress(OSError, TimeoutError, RuntimeError):
                    thing.close()


def _pid() -> int:
    return os.getpid()


def _end_worker(dask_worker: Any) -> None:
    """Run on the nanny: one that stands still hears nothing else."""
    os.kill(dask_worker.pid, signal.SIGKILL)


def _warm_plugin(function: str, payload: dict[str, Any], nice: int) -> Any:
    from distributed import WorkerPlugin

    class WarmUp(WorkerPlugin):  # type: ignore[misc]
        """Imports and compiled kernels before the first job."""

        def setup(self, worker: Any) -> None:
            """Called on the worker."""
            del worker
            if nice:
                os.nice(nice)
            _warm(function, payload)

    return WarmUp()
