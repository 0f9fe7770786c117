"""Whoever comes without right gets nothing written, is counted and told; the good peer goes on meanwhile."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import stat
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transfer_double import hops, key_of, running, until, write_image

from cumbre.archive import distributor, guard
from cumbre.archive.addresses import write_address
from cumbre.archive.certificates import Security, expiries, issue, make_authority
from cumbre.archive.distributor import Distributor
from cumbre.archive.protocol import HEAD, MAGIC, Parcel, encode_frame, read_frame, send_frame
from cumbre.archive.replicator import Replicator
from cumbre.archive.sender import Sender, connect
from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.errors import ConfigurationError, TransientError
from cumbre.core.time import Clock
from cumbre.stores.files import sha256_of_bytes

CONTENT = bytes(range(256)) * 400
Base = Distributor


@pytest.fixture
def base(site: Site, bus: Bus, clock: Clock) -> Iterator[Distributor]:
    made = Distributor(site=site, bus=bus, clock=clock, place="base", scan_every_s=1e9)
    with running(made):
        yield made


@pytest.fixture
def good(site: Site, base: Distributor, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Delivers one more file over one connection that was there before anything bad happened."""
    sender = Sender(base.address, timeout_s=10, security=Security.of(site, "summit"), target="base")
    count = [100]

    def deliver() -> None:
        count[0] += 1
        path = tmp_path / "good"
        path.write_bytes(CONTENT + bytes([count[0]]))
        parcel = Parcel(key_of(count[0]), len(CONTENT) + 1, sha256_of_bytes(path.read_bytes()))
        assert sender.deliver(parcel, path, ask_first=False)["answer"] == "ok"
        assert (site.path("base/raw") / parcel.key).read_bytes() == path.read_bytes()

    deliver()
    yield deliver
    sender.close()


def stranger(site: Site, tmp_path: Path, place: str = "summit", **made: Any) -> Site:
    """A copy of the site's view with certificates of its own: of another authority, or as told."""
    folder = tmp_path / "stranger"
    shutil.copytree(site.root / "certificates", folder / "certificates")
    if made.pop("other_authority", False):
        (folder / "certificates/ca.key").unlink()
        make_authority(folder / "certificates", "Somebody else")
    name = made.pop("name", place)
    issue(folder / "certificates", name, file_name=place, **made)
    shutil.copy(site.root / "certificates/ca.crt", folder / "certificates/ca.crt")
    return Site(folder, site.config)


def attempt(security: Security | None, address: tuple[str, int], tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_bytes(CONTENT)
    sender = Sender(address, timeout_s=5, security=security, target="base")
    try:
        sender.deliver(Parcel(key_of(1), len(CONTENT), sha256_of_bytes(CONTENT)), path, ask_first=False)
    finally:
        sender.close()


def refusals(bus: Bus) -> list[tuple[str, str]]:
    return [(m.fields["reason"], m.fields["identity"]) for m in bus.replay(["Replicator.refusal"])]


def nothing_written(site: Site) -> None:
    assert not (site.path("base/raw") / key_of(1)).exists()
    assert not any(site.path("base/raw/.incoming").iterdir())
    assert not site.path("base/quarantine").exists()


@pytest.mark.parametrize(
    ("place", "made", "reason", "identity"),
    [
        ("summit", {"other_authority": True}, ("unknown-authority", "bad-certificate"), ""),
        ("summit", {"days": -1.5}, ("expired",), ""),
        ("summit", {"name": "mallory"}, ("wrong-place",), ""),
        ("archive", {}, ("wrong-place",), "archive"),
        ("base", {}, ("not-allowed",), "base"),
    ],
)
def test_certificates_that_do_not_fit(
    site: Site, bus: Bus, base: Base, good: Callable[[], None], tmp_path: Path, place: str,
    made: dict[str, Any], reason: tuple[str, ...], identity: str,
) -> None:  # fmt: skip
    other = stranger(site, tmp_path, place, **made)
    # A worker of the base itself may ask, not put: it is told so. All others are not even answered.
    with contextlib.nullcontext() if place == "base" else pytest.raises(TransientError):
        attempt(Security.of(other, place), base.address, tmp_path)
    until(lambda: any(word in reason and who == identity for word, who in refusals(bus)))
    nothing_written(site)
    good()


def test_no_certificate_at_all(
    site: Site, bus: Bus, base: Base, good: Callable[[], None], tmp_path: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(site.path("certificates/ca.crt"))
    with socket.create_connection(base.address) as raw, context.wrap_socket(raw) as connection:
        connection.settimeout(10)
        with pytest.raises(OSError, match=r"(?i)certificate|reset|broken"):
            assert connection.recv(10) != b""
    with pytest.raises(TransientError):
        attempt(None, base.address, tmp_path)  # and without TLS
    until(lambda: {("no-certificate", ""), ("not-tls", "")} <= set(refusals(bus)))
    nothing_written(site)
    good()


def test_old_tls_is_not_spoken(site: Site, base: Base, good: Callable[[], None]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(site.path("certificates/ca.crt"))
    context.load_cert_chain(site.path("certificates/summit.crt"), site.path("certificates/summit.key"))
    with socket.create_connection(base.address) as raw, pytest.raises(ssl.SSLError):
        context.wrap_socket(raw)
    good()


def test_a_false_distributor_gets_nothing(site: Site, tmp_path: Path) -> None:
    """The sender looks whom it speaks with: a certificate of the archive is not one of the base."""
    server = socket.create_server(("127.0.0.1", 0))
    archive = Security.of(site, "archive")
    assert archive is not None
    heard: list[bytes] = []

    def serve() -> None:
        connection, _ = server.accept()
        with (
            contextlib.suppress(OSError),
            archive.context(server=True).wrap_socket(connection, server_side=True) as wrapped,
        ):
            heard.append(wrapped.recv(100))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with pytest.raises(TransientError, match="expected base"):
        attempt(Security.of(site, "summit"), server.getsockname(), tmp_path)
    thread.join(5)
    server.close()
    assert heard in ([], [b""])


class Tap:
    """Keeps every byte that goes through it, as somebody on the way could."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target, self.kept = target, b""
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        near, _ = self.listener.accept()
        far = socket.create_connection(self.target)
        threading.Thread(target=self.pump, args=(far, near, False), daemon=True).start()
        self.pump(near, far, True)

    def pump(self, taken: socket.socket, given: socket.socket, keep: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := taken.recv(65536):
                self.kept += chunk if keep else b""
                given.sendall(chunk)
        for end in (taken, given):
            end.close()


def test_a_recorded_transfer_cannot_be_played_again(
    site: Site, bus: Bus, base: Base, good: Callable[[], None], tmp_path: Path
) -> None:
    tap = Tap(base.address)
    attempt(Security.of(site, "summit"), tap.listener.getsockname(), tmp_path)
    tap.listener.close()
    until(lambda: len(hops(bus, "at_base")) == 2)  # the good one's and this
    assert CONTENT[:64] not in tap.kept
    path = site.path("base/raw") / key_of(1)
    path.unlink()
    with socket.create_connection(base.address, timeout=5) as connection, contextlib.suppress(OSError):
        connection.sendall(tap.kept)
        while connection.recv(4096):
            pass
    until(lambda: any(word in ("not-tls", "bad-certificate") for word, _ in refusals(bus)))
    nothing_written(site)
    # Even the right peer who sends an old file again changes nothing and makes no second hop.
    attempt(Security.of(site, "summit"), base.address, tmp_path)
    attempt(Security.of(site, "summit"), base.address, tmp_path)
    good()
    until(lambda: len(hops(bus, "at_base")) == 3)
    assert path.read_bytes() == CONTENT


@pytest.fixture
def inside(site: Site, base: Base) -> Iterator[socket.socket]:
    """A connection of a peer with the right certificate that then does wrong."""
    connection = connect(base.address, timeout_s=5, security=Security.of(site, "summit"), target="base")
    connection.settimeout(10)
    yield connection
    connection.close()


GOOD = {"op": "put", "key": key_of(1), "size": len(CONTENT), "sha256": sha256_of_bytes(CONTENT)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key": "../../../etc/cron.d/x"}, "bad-parcel"), ({"key": "/etc/passwd"}, "bad-parcel"),
        ({"key": key_of(1).replace("20261120", "..")}, "bad-parcel"), ({"size": -1}, "bad-parcel"),
        ({"size": 1 << 50}, "bad-parcel"), ({"offset": 1 << 40}, "bad-parcel"), ({"offset": -1}, "bad-parcel"),
        ({"encoding": "../x"}, "bad-parcel"), ({"mode": "x" * 5000}, "bad-parcel"), ({"op": "delete"}, "bad-frame"),
        ({"op": "get"}, "not-allowed"), ({"sha256": "sha256:" + "0" * 64}, "corrupt"),
    ],
)  # fmt: skip
def test_frames_that_lie(
    site: Site, bus: Bus, inside: socket.socket, good: Callable[[], None], change: dict[str, Any], reason: str
) -> None:
    send_frame(inside, GOOD | change)
    with contextlib.suppress(OSError):
        inside.sendall(CONTENT)
    with contextlib.suppress(OSError):  # it may have ended the connection while we were still sending
        answer = read_frame(inside)
        assert answer is not None
        assert answer["answer"] in ("refused", "corrupt")
    until(lambda: (reason, "summit") in refusals(bus))
    nothing_written(site)
    good()


@pytest.mark.parametrize("extra", [-1000, 1000])
def test_an_object_of_another_size_than_announced(
    site: Site, bus: Bus, inside: socket.socket, good: Callable[[], None], extra: int
) -> None:
    content = CONTENT[:extra] if extra < 0 else CONTENT + b"x" * extra
    send_frame(inside, GOOD)
    inside.sendall(content)
    socket.socket.shutdown(inside, socket.SHUT_WR)
    until(lambda: ("bad-frame", "summit") in refusals(bus))
    if extra < 0:
        nothing_written(site)
    else:
        # What was announced is whole and verified; what came after it is no frame and ended the connection.
        assert (site.path("base/raw") / key_of(1)).read_bytes() == CONTENT
    good()


def test_refusals_are_counted_by_reason_in_telemetry(
    site: Site, bus: Bus, inside: socket.socket, good: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributor, "REPORT_EVERY_S", 0.05)
    for key in ("../../../etc/cron.d/x", "/etc/passwd", key_of(1).replace("20261120", "..")):
        send_frame(inside, GOOD | {"op": "offer", "key": key})
        assert (read_frame(inside) or {})["answer"] == "refused"
    send_frame(inside, GOOD | {"sha256": "sha256:" + "0" * 64})
    inside.sendall(CONTENT)
    assert (read_frame(inside) or {})["answer"] == "corrupt"

    def told() -> dict[str, int]:
        said = [message.fields for message in bus.replay(["Replicator.distributor"])][-1:]
        assert not said or said[0]["refused"] == sum(said[0]["refusedCounts"])
        return dict(zip(said[0]["refusedReasons"], said[0]["refusedCounts"], strict=True)) if said else {}

    until(lambda: told() == {"bad-parcel": 3, "corrupt": 1})
    nothing_written(site)
    good()


def test_blocks_that_would_unfold_to_more_than_announced(
    site: Site, bus: Bus, inside: socket.socket, good: Callable[[], None]
) -> None:
    import pyarrow

    bomb = pyarrow.Codec("zstd").compress(bytes(64 << 20), asbytes=True)
    assert len(bomb) < 10_000
    send_frame(inside, GOOD | {"encoding": "zstd"})
    inside.sendall(struct.pack(">III", 64 << 20, len(bomb), 0) + bomb)
    until(lambda: ("bad-frame", "summit") in refusals(bus))
    nothing_written(site)
    good()


def test_a_flood_of_connections(site: Site, bus: Bus, base: Base, good: Callable[[], None]) -> None:
    flood = []
    for _ in range(3 * guard.MAX_UNKNOWN):
        flood.append(socket.create_connection(base.address, timeout=5))
    good()
    # A newcomer with a certificate gets through as well: it pushes one of the silent ones out.
    sender = Sender(base.address, timeout_s=5, security=Security.of(site, "summit"), target="base")
    assert sender.ping() == "base-1"
    sender.close()
    until(lambda: ("too-many-connections", "") in refusals(bus))
    assert base._receiver.guard.counts["too-many-connections"] >= guard.MAX_UNKNOWN
    assert len([r for r in refusals(bus) if r[0] == "too-many-connections"]) <= 3
    for connection in flood:
        connection.close()
    good()


def test_a_flood_of_frames(bus: Bus, base: Base, inside: socket.socket, good: Callable[[], None]) -> None:
    # One number of frames in one write: no machine is too slow for it.
    frames = encode_frame({"op": "ping"}) * (guard.FRAMES_PER_S * 3)
    reader = threading.Thread(target=_swallow, args=(inside,), daemon=True)
    reader.start()
    with contextlib.suppress(OSError):
        for _ in range(20):
            inside.sendall(frames)
    until(lambda: ("too-many-frames", "summit") in refusals(bus))
    good()


def _swallow(connection: socket.socket) -> None:
    with contextlib.suppress(OSError, ValueError):
        while connection.recv(65536):
            pass


def test_a_flood_of_refused_frames_ends(bus: Bus, inside: socket.socket, good: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        for _ in range(guard.MAX_FAULTS * 3):
            send_frame(inside, GOOD | {"op": "offer", "key": "x"})
            if read_frame(inside) is None:
                break
        else:
            pytest.fail("the connection did not end")
    assert len([r for r in refusals(bus) if r == ("bad-parcel", "summit")]) <= 2
    good()


def test_slowloris(
    site: Site, bus: Bus, base: Base, good: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "FRAME_S", 0.6)
    connection = connect(base.address, timeout_s=5, security=Security.of(site, "summit"), target="base")
    with contextlib.suppress(OSError):
        for byte in encode_frame({"op": "ping", "x": "y" * 2000}):
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
        pytest.fail("a frame could be sent for ever")
    until(lambda: ("too-slow", "summit") in refusals(bus))
    connection.close()
    good()


def test_slow_bodies_and_silent_handshakes_end(
    site: Site, bus: Bus, base: Base, inside: socket.socket, good: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(guard, "STALL_S", 0.3)
    monkeypatch.setattr("cumbre.archive.receiver.HANDSHAKE_S", 0.3)
    silent = socket.create_connection(base.address, timeout=5)
    send_frame(inside, GOOD)
    inside.sendall(CONTENT[:1000])
    assert silent.recv(1) == b""
    silent.close()
    until(lambda: base._receiver.guard.counts["too-slow"] == 2)
    nothing_written(site)
    good()


def test_a_peer_without_work_is_let_go_and_not_called_an_offender(
    site: Site, bus: Bus, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cumbre.archive.receiver.IDLE_S", 0.3)
    connection = connect(base.address, timeout_s=5, security=Security.of(site, "summit"), target="base")
    assert connection.recv(1) == b""
    connection.close()
    assert base._receiver.guard.counts.total() == 0


def test_a_sender_without_work_keeps_its_connection(
    site: Site, bus: Bus, clock: Clock, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cumbre.archive.receiver.IDLE_S", 1.0)
    monkeypatch.setattr("cumbre.archive.replicator.KEEP_ALIVE_S", 0.2)
    write_address(site, "wan-summit-base-1", base.address)
    with running(Replicator(site=site, bus=bus, clock=clock)):
        for number in (1, 2):
            write_image(site, bus, number)
            until(lambda number=number: len(hops(bus, "at_base")) == 4 * number)  # type: ignore[misc]
            time.sleep(2.0)
    assert hops(bus, "transmitted", outcome=None) == []


def test_frames_of_other_protocols(bus: Bus, inside: socket.socket, good: Callable[[], None]) -> None:
    body = json.dumps({"op": "ping"}).encode()
    inside.sendall(HEAD.pack(MAGIC, len(body), zlib.crc32(body) ^ 1) + body)
    assert inside.recv(1) == b""
    until(lambda: ("bad-frame", "summit") in refusals(bus))
    good()


# the files


def test_the_files_of_a_site_are_private_and_expiry_is_known(site: Site) -> None:
    for path in site.path("certificates").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ends = expiries(site)
    assert len(ends) == 4
    years = {round((end.timestamp() - time.time()) / 86400 / 365, 1) for end in ends.values()}
    assert years == {2.3, 10.0}


def test_certificates_that_are_missing_or_renewed(site: Site, bus: Bus, clock: Clock) -> None:
    made = Distributor(site=site, bus=bus, clock=clock, place="base", scan_every_s=1e9)
    with running(made):
        sender = Sender(made.address, timeout_s=5, security=Security.of(site, "summit"), target="base")
        assert sender.ping() == "base-1"
        sender.close()
        # Renewed while it runs: the next connection shows the new one.
        issue(site.path("certificates"), "base")
        serial = {}
        for _ in range(2):
            connection = connect(
                made.address, timeout_s=5, security=Security.of(site, "summit"), target="base"
            )
            assert isinstance(connection, ssl.SSLSocket)
            serial = connection.getpeercert() or {}
            connection.close()
        from cryptography import x509

        now = x509.load_pem_x509_certificate(site.path("certificates/base.crt").read_bytes())
        assert int(str(serial["serialNumber"]), 16) == now.serial_number
    site.path("certificates/base.key").unlink()
    with pytest.raises(ConfigurationError, match=r"base\.key"):
        Distributor(site=site, bus=bus, clock=clock, place="base")


def test_own_names_in_certificates_of_an_observatory(
    site: Site, bus: Bus, clock: Clock, tmp_path: Path
) -> None:
    issue(site.path("certificates"), "dc1.example.org", file_name="base")
    site.config.places["base"].certificate_name = "dc1.example.org"
    made = Distributor(site=site, bus=bus, clock=clock, place="base", scan_every_s=1e9)
    with running(made):
        attempt(Security.of(site, "summit"), made.address, tmp_path)
    assert (site.path("base/raw") / key_of(1)).read_bytes() == CONTENT


def test_certificates_on_the_command_line(site: Site) -> None:
    from click.testing import CliRunner

    from cumbre.cli.certificates import certificates
    from cumbre.cli.doctor import _certificates

    assert _certificates(site.root)[0]
    issue(site.path("certificates"), "base", days=20)
    good, words = _certificates(site.root)
    assert not good
    assert "base.crt ends in 19 days; renew" in words
    run = CliRunner().invoke(certificates, ["--site", str(site.root), "--renew", "--place", "base", "--json"])
    assert run.exit_code == 0, run.output
    days = {Path(row["file"]).name: row["days"] for row in json.loads(run.output)}
    assert days["base.crt"] > 800
    assert _certificates(site.root)[0]
    with pytest.raises(ConfigurationError, match="expected some of summit"):
        CliRunner().invoke(
            certificates, ["--site", str(site.root), "--renew", "--place", "x"], catch_exceptions=False
        )


def test_a_peer_that_goes_away_in_the_greeting_is_no_stranger(site, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def leave() -> None:
            connection, _ = server.accept()
            connection.recv(65536)
            connection.close()

        gone = threading.Thread(target=leave)
        gone.start()
        with pytest.raises(TransientError, match=r"no connection to .*: it was closed before") as told:
            connect(server.getsockname(), timeout_s=5, security=Security.of(site, "summit"), target="base")
        gone.join()
    assert "not trusted" not in str(told.value)
