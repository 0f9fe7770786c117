"""The remote Butler: the middleware's own client, and that it learns nothing of images under embargo."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid

import httpx
import pytest

from cumbre.core.header import translate
from cumbre.core.instrument import load_instrument
from cumbre.core.time import isot
from cumbre.repository.store import RawFile, create_repository, raw_run
from support.archive_world import AGE_S, DEC, DETECTORS, NEW, NOW_TAI, OLD, RA, ROTATION, World

CAMERA = load_instrument("democam")
RAWS = raw_run("DemoCam")
ENTRY = {OLD: 2026111600001, NEW: 2026112000007}


def header(obs_id: str, detector) -> dict:
    begin = NOW_TAI - AGE_S[obs_id]
    return {
        "OBSID": obs_id, "IMGTYPE": "OBJECT", "EXPTIME": 30.0, "DATE-BEG": isot(begin), "DATE-END": isot(begin + 30),
        "CHIPID": detector.name, "RA": RA, "DEC": DEC, "ROTPA": ROTATION, "BAND": "r", "FILTER": "r_demo",
    }  # fmt: skip


@pytest.fixture(scope="module")
def refs(world: World) -> dict[tuple[str, int], uuid.UUID]:
    """The archive's repository with both exposures; identifiers by exposure and detector."""
    folder = world.site.path("archive/raw")
    files = []
    for obs_id in (OLD, NEW):
        for number in DETECTORS:
            detector = CAMERA.detector(number)
            path = folder / f"{obs_id}_{detector.name}.fits"
            files.append(RawFile(path, translate(CAMERA, [header(obs_id, detector)], str(path))))
    with create_repository(world.site.path("archive/repository"), [CAMERA]) as repository:
        repository.ingest(files)
        found = repository.butler.query_datasets("raw", collections=RAWS, explain=False)
        names = {number: obs_id for obs_id, number in ENTRY.items()}
        return {(names[ref.dataId["exposure"]], ref.dataId["detector"]): ref.id for ref in found}


@pytest.fixture(scope="module")
def connect(world):
    from lsst.daf.butler.remote_butler._config import RemoteButlerOptionsModel
    from lsst.daf.butler.remote_butler._factory import RemoteButlerFactory

    with httpx.Client(timeout=60) as client:
        about = client.get(f"{world.url}/butler/butler.yaml").json()["remote_butler"]
        factory = RemoteButlerFactory(RemoteButlerOptionsModel.model_validate(about), client)
        yield factory.create_butler_for_access_token


@pytest.fixture(scope="module")
def outside(world, refs, connect):
    return connect(world.token("nobody"))


@pytest.fixture(scope="module")
def inside(world, refs, connect):
    return connect(world.token("lena", "embargo"))


def exposures(butler) -> list[int]:
    with butler.query() as query:
        return sorted({ref.dataId["exposure"] for ref in query.datasets("raw", collections=RAWS)})


def run_client(script: str, world: World, token: str, *arguments: str) -> list[str]:
    """What another process prints that has nothing but the address and a token."""
    environment = {
        name: os.environ[name]
        for name in ("PATH", "PYTHONPATH", "HOME", "LD_LIBRARY_PATH")
        if name in os.environ
    }
    done = subprocess.run(
        [sys.executable, "-c", script, world.url, *arguments], env=environment | {"BUTLER_RUBIN_ACCESS_TOKEN": token},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


PIXELS = """
import sys
import numpy as np
from cumbre.core.instrument import load_instrument
from cumbre.repository.remote import connect
from lsst.daf.butler import DatasetNotFoundError

butler = connect(sys.argv[1], collections="DemoCam/raw/all")
detector = load_instrument("democam").detector(3)
for exposure in map(int, sys.argv[2:]):
    try:
        raw = butler.get("raw", instrument="DemoCam", exposure=exposure, detector=3)
    except DatasetNotFoundError as error:
        print(type(error).__name__)
    else:
        y, x = np.mgrid[0:detector.ny, 0:detector.nx]
        expected = (7 * x + 13 * y + 3000) % 60000
        print(raw.header["OBSID"], bool(np.array_equal(raw.assemble(detector), expected)))
"""
COPIED = """
import sys
from pathlib import Path
from lsst.daf.butler import Butler
from cumbre.core.instrument import load_instrument
from cumbre.repository.remote import connect
from cumbre.repository.store import create_repository

butler = connect(sys.argv[1], collections="DemoCam/raw/all")
refs = butler.query_datasets("raw", where="instrument = 'DemoCam' AND day_obs = 20261116")
with create_repository(Path(sys.argv[2]), [load_instrument("democam")]) as mine:
    mine.butler.transfer_from(butler, refs, transfer="copy", transfer_dimensions=True)
    for ref in refs:
        print(mine.butler.get(ref).header["OBSID"])
"""
PLAIN = """
import sys
from lsst.daf.butler import Butler

butler = Butler(sys.argv[1] + "/butler/", collections="DemoCam/raw/all")
print(*sorted({ref.dataId["exposure"] for ref in butler.query_datasets("raw", explain=False)}))
"""


def test_another_process_gets_the_pixels_of_what_is_released_to_it(world, refs):
    both = [str(ENTRY[OLD]), str(ENTRY[NEW])]
    assert run_client(PIXELS, world, world.token("nobody"), *both) == [f"{OLD} True", "DatasetNotFoundError"]
    assert run_client(PIXELS, world, world.token("lena", "embargo"), *both) == [f"{OLD} True", f"{NEW} True"]


def test_data_sets_are_copied_into_a_repository_of_ones_own(world, refs, tmp_path):
    assert run_client(COPIED, world, world.token("nobody"), str(tmp_path / "mine")) == [OLD, OLD]


def test_a_plain_butler_of_the_address_asks(world, refs):
    assert run_client(PLAIN, world, world.token("nobody")) == [str(ENTRY[OLD])]


def test_what_is_released_to_whom(outside, inside):
    assert exposures(outside) == [ENTRY[OLD]]
    assert exposures(inside) == sorted(ENTRY.values())


def test_every_kind_of_question_is_answered(world, outside, inside, refs):
    from lsst.daf.butler import Butler

    with Butler.from_config(str(world.site.path("archive/repository"))) as direct, direct.query() as query:
        none = query.datasets("raw", collections=RAWS).where("instrument = 'DemoCam' AND exposure = 1")
        why = list(none.explain_no_results())
    for butler, count in ((outside, 1), (inside, 2)):
        with butler.query() as query:
            raws = query.datasets("raw", collections=RAWS)
            assert raws.count() == 2 * count
            assert raws.any()
            nothing = raws.where("instrument = 'DemoCam' AND exposure = 1")
            assert not nothing.any(execute=True, exact=True)
            assert list(nothing.explain_no_results()) == why
            assert len(list(query.where(instrument="DemoCam").dimension_records("exposure"))) == count
            where = query.where(instrument="DemoCam").join_dataset_search("raw", RAWS)
            assert len(list(where.data_ids(["exposure", "detector"]))) == 2 * count
            rows = where.general(
                ["exposure", "detector"], dataset_fields={"raw": {"dataset_id"}}, find_first=False
            )
            assert len(list(rows)) == 2 * count
            ids = query.join_data_coordinates(
                [outside.registry.expandDataId(instrument="DemoCam", exposure=ENTRY[OLD], detector=3)]
            )
            assert [ref.id for ref in ids.datasets("raw", collections=RAWS)] == [refs[OLD, 3]]
        assert [kind.name for kind in butler.registry.queryDatasetTypes("r*")] == ["raw"]
        assert RAWS in butler.collections.query("*")
        assert butler.collections.get_info(RAWS, include_summary=True).dataset_types == {"raw"}
        assert len(butler.query_all_datasets(RAWS)) == 2 * count
        found = butler.find_dataset(
            "raw", instrument="DemoCam", exposure=ENTRY[OLD], detector=0, collections=RAWS
        )
        assert found.id == refs[OLD, 0]
        assert butler.get_dataset_type("raw").storageClass_name == "CumbreFits"


def test_nothing_of_an_embargoed_image_is_known_outside(world, outside, inside, refs):
    from lsst.daf.butler import ButlerUserError, DatasetNotFoundError

    secret, nothing = refs[NEW, 0], uuid.uuid4()
    assert inside.get_dataset(secret) is not None
    assert [outside.get_dataset(wanted) for wanted in (secret, nothing)] == [None, None]
    with pytest.raises(DatasetNotFoundError):
        outside.get(inside.get_dataset(secret))
    with pytest.raises(
        ButlerUserError, match="Could not fetch record"
    ):  # not even that there is such an exposure
        outside.registry.expandDataId(instrument="DemoCam", exposure=ENTRY[NEW])
    with httpx.Client(base_url=world.url, timeout=60, headers=world.headers(world.token("nobody"))) as client:
        said = [client.get(f"/butler/v1/dataset/{wanted}/download") for wanted in (secret, nothing)]
        assert [answer.status_code for answer in said] == [404, 404]
        assert said[0].text.replace(str(secret), "") == said[1].text.replace(str(nothing), "")
        files = client.post(
            "/butler/v1/file_transfer", json={"dataset_ids": [str(secret), str(refs[OLD, 0])]}
        )
        assert list(files.json()["files"]) == [str(refs[OLD, 0])]
        many = client.post("/butler/v1/datasets", json={"dataset_ids": [str(secret), str(refs[OLD, 0])]})
        assert str(refs[OLD, 0]) in many.text
        assert str(secret) not in many.text


def test_who_shows_no_right_token_is_refused(world, client, refs):
    path = f"/butler/v1/get_file/{refs[OLD, 0]}"
    assert client.get("/butler/butler.yaml").json()["cls"].endswith("RemoteButler")
    assert client.get(path).status_code == 200  # everybody may have what is public
    assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    only_tables = world.headers(world.token("tom", scopes=("read:tap",)))
    assert client.get(path, headers=only_tables).status_code == 403
    whole = world.site.path("archive/raw") / f"{OLD}_{CAMERA.detector(0).name}.fits"
    assert (
        client.get(client.get(path).json()["artifact"]["file_info"][0]["url"]).content == whole.read_bytes()
    )


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "query/execute", "{}", 400), ("POST", "find_dataset", "[", 400), ("GET", "dataset/xyz", None, 400),
        ("GET", "dataset/../../etc/passwd", None, 404), ("GET", "dataset_type/none", None, 422), ("PUT", "datasets", "{}", 405),
        ("GET", "get_file/00000000-0000-0000-0000-000000000000", None, 422), ("POST", "datasets", '{"dataset_ids": ["x"]}', 400),
    ],
)  # fmt: skip
def test_what_cannot_be_answered(client, refs, method, path, body, status):
    assert client.request(method, f"/butler/v1/{path}", content=body).status_code == status


def test_images_come_when_they_are_released(world, refs, connect):
    world.access.catalogue.move_horizon(NOW_TAI - AGE_S[NEW] + 365 * 86400.0)
    released = world.access._released
    released._followed_s = -1e9
    released.step()
    released._thread.join(60)
    assert exposures(connect(world.token("later"))) == sorted(ENTRY.values())
