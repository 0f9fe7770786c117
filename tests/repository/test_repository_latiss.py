"""Twelve real LATISS raws against the registry that Rubin made of them."""

from __future__ import annotations

import gzip
import sqlite3
from pathlib import Path

import pytest

from cumbre.core.header_files import read_metadata
from cumbre.core.instrument import load_instrument
from cumbre.repository.records import BY_GROUP
from cumbre.repository.store import RawFile, Repository, create_repository

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "raw_lsst_headers"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    path = tmp_path_factory.mktemp("truth") / "registry.sqlite3"
    path.write_bytes(gzip.decompress((DATA / "LATISS_registry.sqlite3.gz").read_bytes()))
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    rows = {row["id"]: dict(row) for row in connection.execute("SELECT * FROM exposure")}
    connection.close()
    return rows


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    latiss = load_instrument("latiss")
    repository = create_repository(tmp_path_factory.mktemp("repo"), [latiss])
    files = sorted(DATA.glob("AT_O_20220208_*.fits.gz"))
    assert len(files) == 12
    repository.ingest([RawFile(path, read_metadata(latiss, path)) for path in files], visit_system=BY_GROUP)
    yield repository
    repository.close()


def test_exposure_rows_equal_the_recorded_registry(repository, truth):
    from lsst.daf.butler.time_utils import TimeConverter

    rows = repository.butler.query_dimension_records("exposure", instrument="LATISS", explain=False)
    assert {row.id for row in rows} == set(truth)
    nanoseconds = TimeConverter().astropy_to_nsec
    for row in rows:
        want = truth[row.id]
        for name in (
            "physical_filter", "obs_id", "exposure_time", "dark_time", "observation_type", "observation_reason",
            "day_obs", "seq_num", "target_name", "science_program", "tracking_ra", "tracking_dec", "sky_angle",
        ):  # fmt: skip
            assert getattr(row, name) == want[name], (row.id, name)
        assert row.group == want["group_name"]
        # Rubin's zenith angle went through astropy's AltAz and back: equal to 1e-9 degrees only.
        assert row.zenith_angle == pytest.approx(want["zenith_angle"], abs=1e-9)
        assert nanoseconds(row.timespan.begin) == want["timespan_begin"]
        assert nanoseconds(row.timespan.end) == want["timespan_end"]


def test_groups_become_visits_with_regions_around_the_pointing(repository, truth):
    from lsst.sphgeom import LonLat, UnitVector3d

    visits = repository.butler.query_dimension_records("visit", instrument="LATISS", explain=False)
    assert {visit.name for visit in visits} == {row["group_name"] for row in truth.values()}
    members = repository.butler.query_dimension_records(
        "visit_definition", instrument="LATISS", explain=False
    )
    first = next(visit for visit in visits if visit.name == "2022-02-09T00:55:40.390")
    assert {m.exposure for m in members if m.visit == first.id} == {
        row["id"] for row in truth.values() if row["group_name"] == first.name
    }
    assert first.exposure_time == 7 * 20 + 5
    for visit in visits:
        row = next(row for row in truth.values() if row["group_name"] == visit.name)
        assert visit.region.contains(
            UnitVector3d(LonLat.fromDegrees(row["tracking_ra"], row["tracking_dec"]))
        )


def test_again_changes_nothing_and_another_site_gives_the_same_uuid(repository, tmp_path):
    latiss = load_instrument("latiss")
    path = sorted(DATA.glob("AT_O_20220208_*.fits.gz"))[0]
    raw = RawFile(path, read_metadata(latiss, path))
    with Repository(repository.root, writeable=True) as again:
        again.ingest([raw])
    with create_repository(tmp_path / "other", [latiss]) as other:
        other.ingest([raw])
        there = other.butler.find_dataset("raw", instrument="LATISS", exposure=raw.metadata.exposure_id,
                                          detector=0, collections="LATISS/raw/all")  # fmt: skip
    here = repository.butler.find_dataset("raw", instrument="LATISS", exposure=raw.metadata.exposure_id,
                                          detector=0, collections="LATISS/raw/all")  # fmt: skip
    assert there.id == here.id == repository.ref(raw.metadata).id
    assert repository.ingested_detectors("LATISS", 2022020800140) == {0}


def test_butler_reads_pixels_and_header(repository):
    raw = repository.butler.get("raw", instrument="LATISS", exposure=2022020800140, detector=0,
                                collections="LATISS/raw/all")  # fmt: skip
    image = raw.assemble(load_instrument("latiss").detectors[0])
    assert image.shape == (4000, 4072)
    header = repository.butler.get("raw.header", instrument="LATISS", exposure=2022020800140, detector=0,
                                   collections="LATISS/raw/all")  # fmt: skip
    assert header["OBSID"] == "AT_O_20220208_000140"
