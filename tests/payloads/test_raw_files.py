"""Reading raw files: our own, foreign ones, and everything that is not a raw file."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cumbre.capture.raw_fits import raw_fits_bytes
from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.core.instrument import load_instrument
from cumbre.payloads.raw import read_raw

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared test data are not here")

PRIMARY = {
    "OBSID": "XC_O_20261120_000012",
    "DAYOBS": 20261120,
    "SEQNUM": 12,
    "GROUPID": "g1",
    "IMGTYPE": "OBJECT",
    "FILTER": "r_demo",
    "EXPTIME": 30.0,
    "DARKTIME": 30.5,
    "DATE-BEG": "2026-11-21T03:00:00.000",
    "DATE-END": "2026-11-21T03:00:30.000",
    "TIMESYS": "TAI",
    "RA": 60.0,
    "DEC": -30.0,
    "ROTPA": 10.0,
    "AIRMASS": 1.1,
    "CHIPID": "R00_S01",
    "DETECTOR": 1,
}


def own_file(detector, array, **changes):
    cards = [{"name": k, "value": v} for k, v in {**PRIMARY, **changes}.items() if v is not None]
    return raw_fits_bytes(detector, array, cards)


@pytest.fixture(scope="module")
def democam():
    return load_instrument("democam")


@pytest.fixture(scope="module")
def array(democam):
    box = democam.detectors[1].amplifiers[0].overscan_box
    return np.random.default_rng(1).integers(900, 1100, (8, 512, box.x1)).astype(np.uint16)


@pytest.fixture(scope="module")
def content(democam, array):
    return own_file(democam.detectors[1], array)


def test_own_file_round_trip(tmp_path, democam, array, content):
    path = tmp_path / "a.fits"
    path.write_bytes(content)
    raw = read_raw(path, democam)
    assert raw.detector.name == "R00_S01"
    assert raw.metadata.exposure_s == 30
    assert raw.header["RA"] == 60.0
    assert len(raw.amplifiers) == 8
    for got, want in zip(raw.amplifiers, array, strict=True):
        assert got.dtype == np.uint16
        assert np.array_equal(got, want)


def test_packed_own_file_is_read_too(tmp_path, democam, array, content):
    import gzip

    path = tmp_path / "a.fits.gz"
    path.write_bytes(gzip.compress(content, 1))
    raw = read_raw(path, democam)
    assert np.array_equal(raw.amplifiers[5], array[5])
    path.write_bytes(gzip.compress(content, 1)[:-5000])
    with pytest.raises(BadFileError, match="damaged"):
        read_raw(path, democam)


def plain(shape, dtype, pixels=None, **cards):
    """A plain one-HDU FITS file, made by hand."""
    bitpix = {"i2": 16, "f4": -32, "u1": 8}[dtype]
    lines = [f"SIMPLE  = {'T':>20}", f"BITPIX  = {bitpix:>20}", f"NAXIS   = {len(shape):>20}"]
    lines += [f"NAXIS{i + 1:<3}= {n:>20}" for i, n in enumerate(shape[::-1])]
    lines += [f"{k:<8}= {v!r:>20}" for k, v in cards.items()]
    header = "".join(f"{line:<80}" for line in [*lines, "END"]).encode()
    header += b" " * (-len(header) % 2880)
    if pixels is None:
        pixels = np.zeros(shape)
    data = np.asarray(pixels).astype(f">{dtype}").tobytes()
    return header + data + b"\0" * (-len(data) % 2880)


CAFOS_CARDS = {
    "DATE-OBS": "2021-03-28T23:09:00",
    "EXPTIME": 60.0,
    "IMAGETYP": "science",
    "INSFLNAM": "JohnsonV",
    "RA": 114.9,
    "DEC": 21.5,
}


def test_foreign_file(tmp_path):
    cafos = load_instrument("cafos")
    path = tmp_path / "uamA_0003.fits"
    pixels = np.arange(1024 * 1024).reshape(1024, 1024) % 3000
    path.write_bytes(plain((1024, 1024), "i2", pixels - 32768, BZERO=32768.0, **CAFOS_CARDS))
    raw = read_raw(path, cafos)
    assert raw.amplifiers[0].dtype == np.uint16
    assert np.array_equal(raw.amplifiers[0], pixels)
    assert raw.metadata.seq_num == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda good: b"", "empty file"),
        (lambda good: b"not a fits file at all" * 200, "not FITS"),
        (lambda good: good[:1000], "without END"),
        (lambda good: good[: len(good) - 2880], "truncated"),
        (lambda good: plain((512, 512), "i2", **CAFOS_CARDS), "needs pixels to x 1024"),
        (lambda good: plain((1024, 1024), "f4", np.full((1024, 1024), np.nan), **CAFOS_CARDS), "NaN"),
        (lambda good: good.replace(f"{1024:>20}".encode(), f"{10**9:>20}".encode(), 1), "pixels"),
        (lambda good: good.replace(b"NAXIS1  =", b"NAXIS7  ="), "NAXIS1 is missing"),
        (lambda good: good.replace(f"{16:>20}".encode(), f"{17:>20}".encode(), 1), "BITPIX = 17"),
        (lambda good: good.replace(b"EXPTIME", b"EXPTOME"), "exposure_s"),
    ],
)
def test_broken_files_say_what_is_wrong(tmp_path, make, message):
    good = plain((1024, 1024), "i2", **CAFOS_CARDS)
    path = tmp_path / "uamA_0003.fits"
    path.write_bytes(make(good))
    with pytest.raises(BadFileError, match=message):
        read_raw(path, load_instrument("cafos"))


def test_missing_things(tmp_path, democam, array):
    with pytest.raises(NotFoundError):
        read_raw(tmp_path / "nothing.fits", democam)
    path = tmp_path / "a.fits"
    path.write_bytes(own_file(democam.detectors[1], array, CHIPID="R99_S99"))
    with pytest.raises(BadFileError):
        read_raw(path, democam)
    whole = own_file(democam.detectors[1], array)
    path.write_bytes(whole.replace(b"Segment11", b"Segment19"))
    with pytest.raises(BadFileError, match="Segment11"):
        read_raw(path, democam)


SMALL = {
    "max_examples": 150,
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@settings(**SMALL)
@given(st.data())
def test_mutated_files_never_crash(tmp_path, democam, content, data):
    """Flipped header bytes, cut tails, swapped digits: the file reads, or it is a BadFileError."""
    broken = bytearray(content)
    headers = [i for i in range(0, len(content), 2880) if content[i : i + 9] in (b"SIMPLE  =", b"XTENSION=")]
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.sampled_from(headers))
        position = start + data.draw(st.integers(0, 2879))
        broken[position] = data.draw(
            st.one_of(st.integers(32, 126), st.integers(48, 57), st.integers(0, 255))
        )
    if data.draw(st.booleans()):
        broken = broken[: data.draw(st.integers(0, len(broken)))]
    path = tmp_path / "mutant.fits"
    path.write_bytes(bytes(broken))
    raw = None
    with contextlib.suppress(BadFileError):
        raw = read_raw(path, democam)
    assert raw is None or len(raw.amplifiers) == 8


@settings(**SMALL)
@given(cut=st.integers(0, 2880 * 3), noise=st.binary(max_size=200), at=st.integers(0, 2879))
def test_mutated_foreign_files_never_crash(tmp_path, cut, noise, at):
    good = bytearray(plain((1024, 1024), "u1", **CAFOS_CARDS))
    good[at : at + len(noise)] = noise
    path = tmp_path / "uamA_0004.fits"
    path.write_bytes(bytes(good[: len(good) - cut]))
    with contextlib.suppress(BadFileError):
        read_raw(path, load_instrument("cafos"))


@needs_data
def test_real_packed_files():
    raw = read_raw(DATA / "raw_cafos/science/NGC2420/V/uamA_0031.fits.bz2", load_instrument("cafos"))
    assert raw.amplifiers[0].shape == (1024, 1024)
    assert raw.metadata.exposure_s == 60
    assert raw.metadata.band == "V"
    kast = read_raw(DATA / "raw_kast_blue/b27.fits.gz", load_instrument("kast_blue"))
    assert kast.amplifiers[0].shape == (350, 2112)
    assert kast.metadata.exposure_s == 1200
    assert 940 < np.median(kast.amplifiers[0][:, 2050:2080]) < 955
