import pytest

from cumbre.core.header import translate
from cumbre.core.instrument import load_instrument
from cumbre.core.time import isot
from cumbre.repository.retention import clean
from cumbre.repository.store import RawFile, create_repository

CAMERA = load_instrument("democam")
T0 = 1795223000.0


def raw(folder, seq_num, detector):
    path = folder / f"{seq_num}_{detector.name}.fits"
    path.write_bytes(b"x" * 100)
    begin = T0 + 100 * seq_num
    header = {
        "OBSID": f"XC_O_20261120_{seq_num:06d}", "IMGTYPE": "BIAS", "EXPTIME": 0.0, "DATE-BEG": isot(begin),
        "DATE-END": isot(begin + 1), "CHIPID": detector.name,
    }  # fmt: skip
    return RawFile(path, translate(CAMERA, [header], str(path)))


@pytest.fixture
def repository(tmp_path):
    with create_repository(tmp_path / "repo", [CAMERA]) as made:
        made.ingest([raw(tmp_path, seq, d) for seq in (1, 2, 3) for d in CAMERA.detectors[:2]])
        yield made


def test_nothing_goes_without_proof(repository, tmp_path):
    out = clean(repository, T0 + 1e6, may_delete=lambda obs_id, detector: False)
    assert out.removed == []
    assert len(out.unproven) == 6
    assert len(list(tmp_path.glob("*.fits"))) == 6


def test_only_old_proven_and_untagged_raws_go(repository, tmp_path):
    from lsst.daf.butler import CollectionType

    butler = repository.butler
    kept = butler.query_datasets("raw", collections="DemoCam/raw/all", instrument="DemoCam",
                                 exposure=2026112000001, detector=0)  # fmt: skip
    butler.collections.register("wanted", CollectionType.TAGGED)
    butler.registry.associate("wanted", kept)
    # Exposure 3 is too young; detector 1 of exposure 2 has no proof.
    out = clean(repository, T0 + 250, may_delete=lambda obs_id, detector: (obs_id[-1], detector) != ("2", 1))
    assert sorted(out.removed) == [("XC_O_20261120_000001", 1), ("XC_O_20261120_000002", 0)]
    assert out.tagged == [("XC_O_20261120_000001", 0)]
    assert out.unproven == [("XC_O_20261120_000002", 1)]
    assert out.freed_bytes == 200
    assert sorted(path.name for path in tmp_path.glob("*.fits")) == [
        "1_R00_S00.fits", "2_R00_S01.fits", "3_R00_S00.fits", "3_R00_S01.fits",
    ]  # fmt: skip
    assert repository.ingested_detectors("DemoCam", 2026112000001) == {0}
