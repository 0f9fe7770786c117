"""The supervisor: starts the database and one process a role, restarts what dies, tells who runs.

State is one file, ``run/supervisor.json``, written atomically on every change; ``cumbre status`` reads it.
Children ask the kernel to die with the supervisor, so a killed supervisor leaves nothing half-alive and a
new one starts from durable state only.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil

from cumbre.core.configuration import Site
from cumbre.core.errors import ConflictError, CumbreError, DeadlineError, NotFoundError
from cumbre.site.roles import roles_of
from cumbre.site.runner import PARENT_VARIABLE, configure_logging
from cumbre.site.runner import main as run_role
from cumbre.stores.files import write_atomic

if TYPE_CHECKING:
    from cumbre.stores.postgres import Database

log = logging.getLogger("cumbre")

SHARED_IMPORTS = ("numpy", "psycopg", "cumbre.bus", "cumbre.stores.postgres", "cumbre.capture.hops", "fitsio")
"""What most services import; loaded once before they are forked. Nothing here starts a thread."""
MODULE = "cumbre.site.supervisor"
STATE_FILE = "run/supervisor.json"
LOCK_FILE = "run/supervisor.lock"
DSN_FILE = "run/postgres.dsn"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)
STOP_DEADLINE_S = 8.0
ORPHAN_DEADLINE_S = 3.0
STABLE_S = 20.0
THREADS = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass
class Child:
    """One service process."""

    name: str
    pid: int | None = None
    state: str = "starting"
    restarts: int = 0
    started_s: float = 0.0
    next_try_s: float = 0.0

    def public(self) -> dict[str, Any]:
        """What status shows."""
        return {"name": self.name, "state": self.state, "pid": self.pid, "restarts": self.restarts}

    def poll(self) -> int | None:
        """Exit status when it has ended (negative: the signal that killed it), else None."""
        assert self.pid is not None
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            return 0
        return None if pid == 0 else os.waitstatus_to_exitcode(status)

    def signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Supervisor:
    """Keeps a site's services running until told to stop."""

    def __init__(self, site: Site) -> None:
        self.site = site
        for folder in ("run", "logs", "bus"):
            (site.root / folder).mkdir(parents=True, exist_ok=True)
        self.children = [Child(name) for name in roles_of(site)]
        self.stopping = False
        self._changed = False
        self._database_checked = time.monotonic()
        self._lock: IO[str] | None = None
        self._postgres: Any = None

    def acquire(self) -> None:
        """Be the only supervisor of this site.

        Raises
        ------
        ConflictError
            Another one runs.
        """
        self._lock = (self.site.root / LOCK_FILE).open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(
                f"{self.site.root}: the site is up already; see: cumbre status --site {self.site.root}"
            ) from None

    def end_orphans(self) -> None:
        """End what a killed supervisor left behind: no role may ever run twice.

        The kernel asked these processes to stop when their parent died; one that hangs or is slow still runs.
        """
        orphans = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            # Services are forks of their supervisor and keep its command line.
            if MODULE in words and str(self.site.root) in words and process.pid != os.getpid():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
                    orphans.append(process)
        for process in psutil.wait_procs(orphans, timeout=ORPHAN_DEADLINE_S)[1]:
            log.warning("pid %d of a former supervisor does not stop; killed", process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                process.wait(STOP_DEADLINE_S)

    def start_database(self) -> None:
        """Start or adopt the embedded server and write its DSN for the others."""
        from cumbre.stores.postgres import EmbeddedPostgres

        path = self.site.root / DSN_FILE
        if self.site.config.database != "embedded":
            path.write_text(self.site.config.database)
            return
        if self._postgres is None:
            self._postgres = EmbeddedPostgres(self.site.root / "postgres")
        dsn = self._postgres.start()
        write_atomic(path, dsn.encode())

    def _spawn(self, child: Child) -> None:
        """Fork a service: what all of them import is loaded once here, so each starts in milliseconds.

        The supervisor has one thread, no bus and no database connection: nothing a fork could break.
        """
        path = self.site.root / "logs" / f"{child.name}.log"
        # Our handlers are not the child's: a stop that came before it has its own would be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        child.pid = os.fork()
        if child.pid == 0:
            code = 1
            try:
                for number in STOP_SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
                os.environ[PARENT_VARIABLE] = str(os.getppid())
                if self._lock is not None:
                    self._lock.close()
                logfile = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(logfile, 1)
                os.dup2(logfile, 2)
                os.close(logfile)
                code = run_role([str(self.site.root), child.name])
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        child.state, child.started_s = "running", time.monotonic()
        log.info("%s started, pid %d", child.name, child.pid)

    def tick(self) -> bool:
        """Look after every child once; True when something changed."""
        changed = False
        now = time.monotonic()
        for child in self.children:
            if child.pid is None:
                if now >= child.next_try_s:
                    self._spawn(child)
                    changed = True
                continue
            code = child.poll()
            if code is None:
                continue
            lived = now - child.started_s
            child.restarts += 1
            pause = BACKOFF_S[0] if lived > STABLE_S else BACKOFF_S[min(child.restarts, len(BACKOFF_S)) - 1]
            log.warning("%s (pid %s) ended with %s; again in %.1f s", child.name, child.pid, code, pause)
            child.pid, child.state = None, "restarting"
            child.next_try_s = now + pause
            changed = True
        return changed

    def _database_alive(self) -> bool:
        return self._postgres is None or self._postgres.dsn_if_running() is not None

    def save(self) -> None:
        """Write the state file."""
        path = self.site.root / STATE_FILE
        state: dict[str, Any] = {
            "pid": os.getpid(),
            "services": [child.public() for child in self.children],
        }
        if self.site.config.database == "embedded":
            state["services"].append(
                {"name": "postgres", "state": "running", "pid": postgres_pid(self.site), "restarts": 0}
            )
        write_atomic(path, json.dumps(state).encode())

    def run(self) -> None:
        """Run until SIGTERM or SIGINT, then stop everything in order."""
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: setattr(self, "stopping", True))
        self.acquire()
        self.end_orphans()
        self.start_database()
        for module in SHARED_IMPORTS:
            importlib.import_module(module)
        self.save()
        told = ""
        while not self.stopping:
            try:
                self._look_after()
                told = ""
            except (OSError, CumbreError) as error:
                # A full disk or a database that cannot start now is no reason to take all services down.
                if str(error) != told:
                    told = str(error)
                    log.error("%s; what runs goes on, and this is tried again", told)
            time.sleep(0.1)
        self.shut_down()

    def _look_after(self) -> None:
        """One turn: children, once a second the database, and the state file when something changed."""
        self._changed = self.tick() or self._changed
        if time.monotonic() - self._database_checked > 1.0:
            self._database_checked = time.monotonic()
            if not self._database_alive():
                log.warning("the database server is gone; starting it again")
                self.start_database()
                self._changed = True
        if self._changed:
            self.save()
            self._changed = False

    def shut_down(self) -> None:
        """Stop the services, last the database; kill what does not stop by itself."""
        running = [child for child in self.children if child.pid is not None]
        for child in running:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_DEADLINE_S
        for child in running:
            while child.poll() is None:
                if time.monotonic() > deadline:
                    log.warning("%s does not stop; killed", child.name)
                    child.signal(signal.SIGKILL)
                    deadline = time.monotonic() + STOP_DEADLINE_S
                time.sleep(0.02)
            child.pid, child.state = None, "stopped"
        if self._postgres is not None:
            self._postgres.stop()
        (self.site.root / STATE_FILE).unlink(missing_ok=True)
        log.info("site stopped")


def postgres_pid(site: Site) -> int | None:
    """Pid of the embedded server."""
    for path in sorted((site.root / "postgres").glob("postmaster.pid")):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it is just being written or removed
            return int(path.read_text().split()[0])
    return None


def read_state(site: Site) -> dict[str, Any] | None:
    """State of a running supervisor; None when the site is down."""
    try:
        state: dict[str, Any] = json.loads((site.root / STATE_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state if alive(int(state["pid"])) else None


@contextmanager
def site_database_of_any(site: Site) -> Iterator[Database]:
    """The database of a site that runs or not; its embedded server is started for the block where it does not run.

    Raises
    ------
    NotFoundError
        The site never ran.
    """
    from cumbre.stores.postgres import Database, EmbeddedPostgres

    if site.config.database != "embedded":
        yield Database(site.config.database)
        return
    folder = site.root / "postgres"
    if not folder.is_dir():
        raise NotFoundError(
            f"{site.root}: it never ran, so nothing is archived; start it: cumbre up --site {site.root}"
        )
    postgres = EmbeddedPostgres(folder)
    was_running = postgres.dsn_if_running() is not None
    try:
        yield Database(postgres.start())
    finally:
        # a site that was started meanwhile uses the server: it is left to it
        if not was_running and read_state(site) is None:
            postgres.stop()


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def start_detached(site: Site, *, wait_s: float = 180.0) -> dict[str, Any]:
    """Start a supervisor that outlives this process and wait until every service was started.

    Raises
    ------
    ConflictError
        The site is up already.
    DeadlineError
        It did not come up; the message names the log.
    """
    if read_state(site) is not None:
        raise ConflictError(f"{site.root}: the site is up already; see: cumbre status --site {site.root}")
    (site.root / "logs").mkdir(parents=True, exist_ok=True)
    path = site.root / "logs" / "supervisor.log"
    # A session of its own and no parent that waits: it outlives us on purpose.
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", MODULE, str(site.root)],
        os.environ | THREADS,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        state = read_state(site)
        if state is not None and all(s["state"] == "running" for s in state["services"]):
            return state
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            break
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)  # half a site is not left running
    tail = "\n".join(path.read_text(errors="replace").splitlines()[-8:])
    raise DeadlineError(f"{site.root}: the services did not come up; the end of {path}:\n{tail}")


def stop_site(site: Site, *, wait_s: float = 30.0) -> bool:
    """Stop a site's supervisor and wait for its end; False when it was not running."""
    state = read_state(site)
    if state is None:
        return False
    pid = int(state["pid"])
    os.kill(pid, signal.SIGTERM)
    try:
        psutil.Process(pid).wait(wait_s)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        raise DeadlineError(f"{site.root}: supervisor {pid} did not stop within {wait_s:.0f} s") from None
    return True


def main() -> int:
    """``python -m cumbre.site.supervisor SITE``."""
    configure_logging("supervisor")
    try:
        Supervisor(Site.load(Path(sys.argv[1]))).run()
    except Exception as error:
        log.critical("%s", error, exc_info=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
