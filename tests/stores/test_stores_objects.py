from __future__ import annotations

from pathlib import Path

import pytest

from cumbre.core.errors import BadFileError, ConfigurationError, NotFoundError, UserError
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
