"""Real fields with a known answer: HSC stars against Gaia, and one sky at several epochs of two cameras."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from scipy.ndimage import map_coordinates

from cumbre.core.errors import CumbreError
from cumbre.payloads.calibrate import solve_astrometry
from cumbre.payloads.kernels.photometry import forced_psf_photometry
from cumbre.payloads.kernels.psf import PsfModel, fwhm_of
from cumbre.payloads.kernels.wcs import PlaneWcs
from cumbre.payloads.refcat import RefCat

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
HSC, EPOCHS = DATA / "astrometry_hsc", DATA / "multiepoch_legacysurvey" / "mzlsbass3"
needs_hsc = pytest.mark.skipif(not HSC.is_dir(), reason=f"{HSC} is absent")
needs_epochs = pytest.mark.skipif(not EPOCHS.is_dir(), reason=f"{EPOCHS} is absent")


def gaia_at(mjd):
    table = pq.read_table(HSC / "gaia_refCat.parquet")
    ra, dec, pm_ra, pm_dec, epoch, flag, flux = (
        table[name].to_numpy()
        for name in ("coord_ra", "coord_dec", "pm_ra", "pm_dec", "epoch", "pm_flag", "phot_g_mean_flux")
    )
    years = np.where(flag, 0.0, (mjd - epoch) / 365.25)
    ra = ra + np.nan_to_num(pm_ra) * years / np.cos(dec)
    dec = dec + np.nan_to_num(pm_dec) * years
    return RefCat(np.degrees(ra), np.degrees(dec), {"z": 31.4 - 2.5 * np.log10(flux)})


@needs_hsc
def test_hsc_detectors_agree_with_gaia():
    # Every sixth detector; the header's first guess knows no distortion, which moves stars by up to 35 pixels.
    files = sorted(HSC.glob("1180_*.fits.gz"), key=lambda p: int(p.name[5:-8]))[::6]
    reference = gaia_at(fits.getheader(files[0])["MJD"])
    rms, matched = [], []
    for path in files:
        stars = fits.getdata(path, 1)
        # the lists have no fluxes: bright stars are those with small errors
        order = np.argsort(stars["xErr"] + stars["yErr"], kind="stable")
        x, y = (stars[name][order].astype(float) for name in ("x", "y"))
        try:
            fit, first, _ = solve_astrometry(
                x, y, reference, PlaneWcs.from_header(fits.getheader(path)), band="z", shape=(4176, 2048),
                pointing_error_deg=0.01,
            )  # fmt: skip
        except CumbreError:
            continue
        rms.append(1e3 * np.hypot(fit.rms_x_arcsec, fit.rms_y_arcsec) / np.sqrt(2))
        matched.append(len(first))
    assert len(rms) >= len(files) - 1
    assert np.median(rms) < 20
    assert max(rms) < 35
    assert min(matched) >= 10


def psfex(path, shape):
    """PSF at the middle of the cutout, on its pixels."""
    hdu = fits.open(path)[1]
    header = hdu.header
    terms = hdu.data["psf_mask"].ravel()
    n = round((terms.size / header["PSFAXIS3"]) ** 0.5)
    terms = terms.reshape(-1, n, n).astype(float)
    u = (shape[1] / 2 - header["POLZERO1"]) / header["POLSCAL1"]
    v = (shape[0] / 2 - header["POLZERO2"]) / header["POLSCAL2"]
    degree = header["POLDEG1"]
    factors = [u**i * v**j for j in range(degree + 1) for i in range(degree + 1 - j)]
    model = np.tensordot(factors, terms, 1)
    step, middle = header["PSF_SAMP"], n // 2
    half = int(middle * step)
    grid = np.arange(-half, half + 1) / step + middle
    stamp = map_coordinates(model, np.meshgrid(grid, grid, indexing="ij"), order=3)
    return PsfModel((stamp / stamp.sum())[None].astype(np.float32), shape, fwhm_of(stamp))


def epochs():
    """Per band: image without its sky, variance, bad pixels, PSF, WCS, flux scale."""
    out = {}
    for row in Table.read(EPOCHS / "survey-ccds-1.fits.gz"):
        path = EPOCHS / "images" / (str(row["image_filename"]).strip() + ".gz")
        hdu = fits.open(path)[1]
        weight = fits.getdata(str(path).replace("_ooi_", "_oow_"), 1).astype(float)
        bad = (fits.getdata(str(path).replace("_ooi_", "_ood_"), 1) != 0) | (weight <= 0)
        image = hdu.data.astype(np.float32)
        sky = image[~bad]
        for _ in range(8):
            sky = sky[np.abs(sky - np.median(sky)) < 2.5 * 1.4826 * np.median(np.abs(sky - np.median(sky)))]
        (model,) = (EPOCHS / "calib").glob(f"*/psfex/*/*{int(row['expnum'])}/*.fits.gz")
        variance = np.where(bad, 1e30, 1 / np.maximum(weight, 1e-30)).astype(np.float32)
        scale = 10 ** (-0.4 * (float(row["ccdzpt"]) - 22.5)) / float(row["exptime"])
        out.setdefault(str(row["filter"]).strip(), []).append(
            (
                image - np.float32(np.median(sky)),
                variance,
                bad,
                psfex(model, image.shape),
                WCS(hdu.header),
                scale,
            )
        )
    return out


@needs_epochs
def test_forced_fluxes_of_several_epochs_and_cameras_agree():
    import sep

    bands = epochs()
    assert {band: len(images) for band, images in bands.items()} == {"g": 3, "r": 3, "z": 2}
    image, variance, bad, _, wcs, _ = min(bands["z"], key=lambda e: e[3].fwhm_px)
    found = sep.extract(image, 4.0, err=float(np.sqrt(np.median(variance[~bad]))), mask=bad)
    assert len(found) >= 2
    ra, dec = wcs.all_pix2world(found["x"], found["y"], 0)
    pulls, scatters = [], []
    for images in bands.values():
        fluxes, errors = [], []
        for image, variance, bad, psf, wcs, scale in images:
            x, y = wcs.all_world2pix(ra, dec, 0)
            made = forced_psf_photometry(image, variance, bad.astype(np.uint16), psf, x, y, bad_bits=1)
            fluxes.append(made.flux * scale)
            # two per cent: zero points
            errors.append(np.hypot(made.flux_err * scale, 0.02 * made.flux * scale))
            # at empty places fluxes scatter as their errors say
            gx, gy = (g.ravel() for g in np.meshgrid(np.linspace(8, 50, 8), np.linspace(8, 50, 8)))
            empty = np.hypot(gx[:, None] - x, gy[:, None] - y).min(axis=1) > 3 * psf.fwhm_px
            sky = forced_psf_photometry(
                image, variance, bad.astype(np.uint16), psf, gx[empty], gy[empty], bad_bits=1
            )
            scatter = sky.flux / sky.flux_err
            scatter = scatter[np.isfinite(scatter)]
            assert len(scatter) >= 15
            scatters.append(0.7413 * np.subtract(*np.percentile(scatter, [75, 25])))
        flux, error = np.array(fluxes), np.array(errors)
        mean = np.average(flux, axis=0, weights=error**-2)
        pulls += ((flux - mean) / error).ravel().tolist()
    assert np.isfinite(pulls).all()
    assert np.abs(pulls).max() < 3
    assert np.std(pulls) < 1.3
    assert 0.9 < np.median(scatters) < 1.2
