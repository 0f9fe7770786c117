"""The wire: whatever bytes come, the reader ends, says so, and takes no memory for what was only announced."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transfer_double import key_of

from cumbre.archive.protocol import (
    HEAD,
    MAGIC,
    MAX_BODY_BYTES,
    Parcel,
    ProtocolError,
    encode_frame,
    read_frame,
    send_frame,
)
from cumbre.archive.receiver import Receiver
from cumbre.archive.sender import Sender
from cumbre.core.errors import BadFileError
from cumbre.core.time import Clock
from cumbre.stores.files import sha256_of_bytes

CONTENT = bytes(range(256)) * 500
SHA = sha256_of_bytes(CONTENT)


class Bytes:
    """A stream that gives its bytes in pieces and counts how much was asked for at once."""

    def __init__(self, content: bytes, piece: int = 7) -> None:
        self.content, self.piece, self.place, self.largest = content, piece, 0, 0

    def recv_into(self, buffer: memoryview) -> int:
        self.largest = max(self.largest, len(buffer))
        part = self.content[self.place : self.place + min(self.piece, len(buffer))]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=400), st.integers(1, 50))
def test_any_bytes_end_the_reader(content: bytes, piece: int) -> None:
    stream = Bytes(content, piece)
    try:
        while read_frame(stream) is not None:
            pass
    except ProtocolError:
        pass
    assert stream.largest <= MAX_BODY_BYTES


@given(st.integers(0, 2**32 - 1), st.binary(max_size=60))
def test_announced_lengths_take_no_memory(length: int, body: bytes) -> None:
    stream = Bytes(HEAD.pack(MAGIC, length, zlib.crc32(body)) + body)
    with contextlib.suppress(ProtocolError):
        read_frame(stream)
    assert stream.largest <= MAX_BODY_BYTES


@given(st.dictionaries(st.text(max_size=10), json_values, max_size=5), st.data())
def test_frames_come_back_and_any_flipped_bit_is_seen(body: dict[str, Any], data: st.DataObject) -> None:
    raw = encode_frame(body)
    assert read_frame(Bytes(raw)) == json.loads(json.dumps(body))
    place, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    broken = bytearray(raw)
    broken[place] ^= 1 << bit
    with pytest.raises(ProtocolError):
        read_frame(Bytes(bytes(broken)))


@given(st.dictionaries(st.sampled_from(["op", "key", "size", "sha256", "group_id"]), json_values))
def test_any_parcel_is_valid_or_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadFileError):
        Parcel.checked(fields)


def test_deep_json_and_other_types_are_refused() -> None:
    for raw in (b"[" * 60000, b"[]", b"1", b"\xff\xfe", b""):
        with pytest.raises(ProtocolError):
            read_frame(Bytes(HEAD.pack(MAGIC, len(raw), zlib.crc32(raw)) + raw, 4096))
    with pytest.raises(ProtocolError, match="at most"):
        encode_frame({"a": "x" * 70000})


class Place:
    """A receiver and what it reported."""

    def __init__(self, root: Path) -> None:
        self.root, self.arrived, self.refused = root / "raw", [], []  # type: ignore[var-annotated]
        self.receiver = Receiver(
            root=self.root,
            quarantine_folder=root / "quarantine",
            clock=Clock.real(),
            arrived=lambda parcel, path: self.arrived.append((parcel, path)),
            refused=lambda said, outcome, message, kept: self.refused.append((said, outcome, message, kept)),
            max_bytes=1 << 20,
        )

    def raw_connection(self) -> socket.socket:
        connection = socket.create_connection(self.receiver.address, timeout=5)
        connection.settimeout(5)
        return connection


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.receiver.close()


def deliver(
    place: Place, content: bytes, *, ask_first: bool = False, sha256: str | None = None
) -> dict[str, Any]:
    source = place.root.parent / f"source-{threading.get_ident()}"
    source.write_bytes(content)
    sender = Sender(place.receiver.address, timeout_s=5)
    parcel = Parcel(key_of(1), len(content), sha256 or sha256_of_bytes(content), "g")
    try:
        return sender.deliver(parcel, source, ask_first=ask_first)
    finally:
        sender.close()


def test_delivery_duplicate_conflict(place: Place) -> None:
    assert deliver(place, CONTENT)["answer"] == "ok"
    path = place.root / key_of(1)
    assert path.read_bytes() == CONTENT
    assert deliver(place, CONTENT, ask_first=True)["answer"] == "have"
    assert deliver(place, CONTENT)["answer"] == "ok"
    other = CONTENT[::-1]
    assert deliver(place, other, ask_first=True)["answer"] == "conflict"
    assert path.read_bytes() == CONTENT
    ((_, outcome, _, kept),) = place.refused
    assert outcome == "Conflict"
    assert kept.read_bytes() == other
    assert json.loads(kept.with_name(f"{kept.name}.reason.json").read_bytes())["outcome"] == "Conflict"


def test_corrupted_bytes_are_never_stored(place: Place) -> None:
    assert (
        deliver(place, CONTENT, sha256=SHA.replace(SHA[-1], "0" if SHA[-1] != "0" else "1"))["answer"]
        == "corrupt"
    )
    assert not (place.root / key_of(1)).exists()
    assert list((place.root / ".incoming").iterdir()) == []
    assert place.arrived == []


@pytest.mark.parametrize(
    "change",
    [
        {"key": "../../../../etc/cron.d/x"}, {"key": "/etc/passwd"}, {"key": key_of(1) + "\x00"}, {"key": 7},
        {"key": "DemoCam/20261120/../../../a/b.fits"}, {"size": -1}, {"size": 0}, {"size": 1 << 40}, {"size": "9"},
        {"size": True}, {"sha256": "sha256:" + "g" * 64}, {"sha256": "md5:1"}, {"group_id": "x" * 1000},
        {"op": "delete"}, {"op": None},
    ],
)  # fmt: skip
def test_bad_parcels_are_refused(place: Place, change: dict[str, Any], tmp_path: Path) -> None:
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with place.raw_connection() as connection:
        good = {"op": "put", "key": key_of(1), "size": len(CONTENT), "sha256": SHA, "group_id": ""}
        send_frame(connection, good | change)
        answer = read_frame(connection)
        assert answer is not None
        assert answer["answer"] == "refused"
        assert read_frame(connection) is None  # closed: nobody knows where the next frame would begin
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_cut_connection_leaves_nothing_and_others_work(place: Place) -> None:
    with place.raw_connection() as connection:
        send_frame(connection, Parcel(key_of(1), len(CONTENT), SHA).fields("put"))
        connection.sendall(CONTENT[:1000])
    with place.raw_connection() as noise:
        noise.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert noise.recv(10) == b""
    assert deliver(place, CONTENT)["answer"] == "ok"
    assert len(place.arrived) == 1


def test_the_same_key_from_many_connections_at_once(place: Place) -> None:
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.append(deliver(place, CONTENT)["answer"])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) <= {"ok", "later"}
    assert "ok" in answers
    assert (place.root / key_of(1)).read_bytes() == CONTENT
