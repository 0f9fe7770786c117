from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from cumbre.core.errors import (
    BadFileError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    TransientError,
    UserError,
)
from cumbre.stores.objects import ObjectStore

ABC = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return ObjectStore(tmp_path / "objects")
    return ObjectStore(f"s3://{request.getfixturevalue('s3_bucket')}/site/raw")


def test_objects_come_back_as_they_went(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"abc")
    assert store.put("20261120/one.fits", source).sha256 == ABC
    assert store.put("20261120/two.json", b"abc", ABC).size == 3
    store.put("20261121/three.fits", b"")
    assert store.get("20261120/one.fits", ABC) == b"abc"
    assert store.size("20261120/one.fits") == 3
    assert list(store.list("20261120")) == ["20261120/one.fits", "20261120/two.json"]
    assert sorted(store.list()) == ["20261120/one.fits", "20261120/two.json", "20261121/three.fits"]
    store.put("20261120/one.fits", b"newer")  # replaces
    assert store.get("20261120/one.fits") == b"newer"
    store.delete("20261120/one.fits")
    store.delete("20261120/one.fits")
    assert not store.exists("20261120/one.fits")
    assert store.exists("20261120/two.json")


def test_wrong_content_is_refused_on_both_ways(store: ObjectStore) -> None:
    with pytest.raises(BadFileError, match="expected sha256:ba78"):
        store.put("x", b"abd", ABC)
    assert not store.exists("x")
    store.put("x", b"abd")
    with pytest.raises(BadFileError):
        store.get("x", ABC)


def test_what_is_put_new_is_never_replaced(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"abc")
    assert store.put_new("tape/one.tar", source, ABC)
    assert not store.put_new("tape/one.tar", b"abc", ABC)
    other = "sha256:a52d159f262b2c6ddb724a61840befc36eb30c88877a4030b65cbe86298449c9"
    with pytest.raises(ConflictError, match="first one is kept"):
        store.put_new("tape/one.tar", b"abd", other)
    assert store.get("tape/one.tar") == b"abc"
    with pytest.raises(BadFileError):
        store.put_new("tape/two.tar", b"abd", ABC)
    assert not store.exists("tape/two.tar")
    assert list(store.list("tape")) == ["tape/one.tar"]


def test_somebody_else_stores_at_the_same_time(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("tape/one.tar", b"the other's")
    if store._folder is None:
        real, looked = ObjectStore._head, list[Any]()

        def late(*given: Any) -> Any:
            looked.append(given)
            return None if len(looked) == 1 else real(*given)  # not there yet when we looked

        monkeypatch.setattr(ObjectStore, "_head", staticmethod(late))
    else:
        monkeypatch.setattr(Path, "exists", lambda _: False)
    with pytest.raises(ConflictError):
        store.put_new("tape/one.tar", b"abc", ABC)
    monkeypatch.undo()
    assert store.get("tape/one.tar") == b"the other's"


def test_parts_of_objects(store: ObjectStore) -> None:
    store.put("one", bytes(range(200)))
    assert store.read_range("one", 10, 5) == bytes(range(10, 15))
    assert store.read_range("one", 195, 100) == bytes(range(195, 200))
    assert store.read_range("one", 0, 0) == b""
    with pytest.raises(NotFoundError):
        store.read_range("no/such", 0, 1)


def test_a_bucket_that_does_not_answer_is_a_passing_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    store = ObjectStore("s3://nobody/there")
    with pytest.raises(TransientError):
        store.put_new("a", b"abc", ABC)
    with pytest.raises(TransientError):
        store.size("a")


def test_absent_objects_are_named(store: ObjectStore) -> None:
    with pytest.raises(NotFoundError, match="no/such"):
        store.get("no/such")
    with pytest.raises(NotFoundError, match="no/such"):
        store.size("no/such")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../b"])
def test_keys_stay_in_the_store(store: ObjectStore, key: str) -> None:
    with pytest.raises(UserError):
        store.put(key, b"")


def test_unfinished_writes_are_not_listed(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path)
    store.put("a", b"1")
    (tmp_path / ".b.0123456789ab.tmp").write_bytes(b"half")
    assert list(store.list()) == ["a"]


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="gopher"):
        ObjectStore("gopher://x")
