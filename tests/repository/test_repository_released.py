"""The released part of a repository: what is in it, when, and that files are never touched."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.io import fits

from cumbre.core.header import translate
from cumbre.core.instrument import load_instrument
from cumbre.core.time import isot
from cumbre.repository.calibrations import put_calibration
from cumbre.repository.released import ReleasedCopy
from cumbre.repository.store import RawFile, create_repository

CAMERA = load_instrument("democam")
T0 = 1795223000.0
RAWS = "DemoCam/raw/all"


def raw(folder, seq_num, days_ago=0):
    detector = CAMERA.detectors[0]
    path = folder / f"{seq_num}_{detector.name}.fits"
    path.write_bytes(b"x" * 100)
    begin = T0 + 100 * seq_num - 86400 * days_ago
    header = {
        "OBSID": f"XC_O_20261120_{seq_num:06d}", "IMGTYPE": "OBJECT", "EXPTIME": 1.0, "DATE-BEG": isot(begin),
        "DATE-END": isot(begin + 1), "CHIPID": detector.name, "RA": 53.0, "DEC": -27.0, "ROTPA": 0.0, "BAND": "r",
        "FILTER": "r_demo",
    }  # fmt: skip
    return RawFile(path, translate(CAMERA, [header], str(path)))


@pytest.fixture
def repository(tmp_path):
    with create_repository(tmp_path / "whole", [CAMERA]) as made:
        made.ingest([raw(tmp_path, seq) for seq in (1, 2, 3)])
        yield made


@pytest.fixture
def copy(repository, tmp_path):
    return ReleasedCopy(repository.root, tmp_path / "released")


def exposures(copy) -> list[int]:
    from lsst.daf.butler import Butler

    with Butler.from_config(str(copy.root)) as butler:
        found = butler.query_datasets("raw", collections=RAWS, explain=False)
        known = butler.query_dimension_records("exposure", instrument="DemoCam", explain=False)
        assert {record.id for record in known} == {ref.dataId["exposure"] for ref in found}
        assert all(butler.getURI(ref).exists() for ref in found)
    return sorted(ref.dataId["exposure"] % 100000 for ref in found)


def test_it_grows_with_the_horizon_and_takes_late_ones(repository, copy, tmp_path):
    assert copy.follow(T0 + 99.5, T0 + 999).added == 0  # half a second before the first begins
    assert copy.follow(T0 + 150, T0 + 1000).added == 1
    assert exposures(copy) == [1]
    assert copy.follow(T0 + 150, T0 + 1001).added == 0
    assert copy.follow(T0 + 250, T0 + 1002).added == 1
    assert exposures(copy) == [1, 2]
    repository.ingest([raw(tmp_path, 9, days_ago=3)])  # an old one that came late
    assert copy.follow(T0 + 250, T0 + 1003).added == 1
    assert exposures(copy) == [1, 2, 9]


def test_identifiers_are_the_same_and_chains_come_too(repository, copy):
    from lsst.daf.butler import Butler, CollectionType

    whole = repository.butler
    whole.collections.register("DemoCam/defaults", CollectionType.CHAINED)
    whole.collections.redefine_chain("DemoCam/defaults", [RAWS])
    whole.collections.register("u/eva/mine", CollectionType.CHAINED)
    whole.collections.redefine_chain("u/eva/mine", [RAWS])
    copy.follow(T0 + 250, T0 + 1000)
    with Butler.from_config(str(copy.root)) as butler:
        mine = {ref.id for ref in butler.query_datasets("raw", collections="DemoCam/defaults", explain=False)}
        assert set(butler.collections.query("*")) == {RAWS, "DemoCam/defaults"}
    everything = {ref.id for ref in whole.query_datasets("raw", collections=RAWS, explain=False)}
    assert len(mine) == 2
    assert mine < everything


def test_calibrations_hold_when_they_do_in_the_whole_repository(repository, copy, tmp_path):
    from lsst.daf.butler import Butler, CollectionType

    def put(value, begin, end, version):
        path = tmp_path / f"frame{value}.fits"
        fits.PrimaryHDU(np.full((2, 2), value, np.float32)).writeto(path)
        put_calibration(
            repository, "bias", path, instrument="DemoCam", detector=1, valid_begin_tai=begin, valid_end_tai=end,
            version=version,
        )  # fmt: skip

    def held(butler):
        found = butler.registry.queryDatasetAssociations(
            "bias", ..., collectionTypes={CollectionType.CALIBRATION}
        )
        return {(one.collection, one.ref.id, one.timespan) for one in found}

    put(1, T0, T0 + 1000, "1")
    for number in (2, 3):  # the second ends the first where it begins
        copy.follow(T0 + 250, T0 + 1000 * number)
        with Butler.from_config(str(copy.root)) as butler, Butler.from_config(str(repository.root)) as whole:
            assert held(butler) == held(whole)
            assert len(held(butler)) == number - 1
        put(number, T0 + 500 * number, T0 + 9000, str(number))


def test_collections_of_users_stay_theirs(repository, copy, tmp_path):
    from lsst.daf.butler import DatasetType

    whole = repository.butler
    kind = DatasetType("numbers", ("instrument", "exposure"), "StructuredDataDict", universe=whole.dimensions)
    whole.registry.registerDatasetType(kind)
    first = 2026112000001
    for run in ("u/eva/run", "DemoCam/quality"):
        whole.collections.register(run)
        whole.put({"a": 1}, kind, instrument="DemoCam", exposure=first, run=run)
        whole.put({"a": 3}, kind, instrument="DemoCam", exposure=first + 2, run=run)
    copy.follow(T0 + 250, T0 + 1000)
    from lsst.daf.butler import Butler

    with Butler.from_config(str(copy.root)) as butler:
        (ref,) = butler.query_datasets("numbers", collections="*", find_first=False, explain=False)
        assert (ref.run, ref.dataId["exposure"]) == ("DemoCam/quality", first)
        assert butler.get(ref) == {"a": 1}


def test_what_was_deleted_goes_and_files_are_not_touched(repository, copy, tmp_path):
    copy.follow(T0 + 350, T0 + 1000)
    assert exposures(copy) == [1, 2, 3]
    gone = repository.butler.query_datasets(
        "raw", collections=RAWS, instrument="DemoCam", exposure=2026112000002
    )
    repository.butler.pruneDatasets(gone, disassociate=True, unstore=True, purge=True)
    assert copy.follow(T0 + 350, T0 + 1001, forget=True).removed == 1
    from lsst.daf.butler import Butler

    with Butler.from_config(str(copy.root)) as butler:
        found = butler.query_datasets("raw", collections=RAWS, explain=False)
    assert sorted(ref.dataId["exposure"] % 10 for ref in found) == [1, 3]
    assert len(list(tmp_path.glob("*.fits"))) == 3
