"""Fake sources in calibrated images: completeness on the very night, and examples to train on.

Fakes are planted after calibration and before differencing, with the image's own PSF and the photon noise of their
light; their pixels carry INJECTED. Transients lie anywhere, near galaxies and stars as often as the sky has them
(``near_part``); variables lie on stars and add or take a part of their light.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import UnprocessableDataError
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels.psf import PsfModel
from cumbre.payloads.processing import sky_of

FAKE_DTYPE = np.dtype(
    [(name, np.float64) for name in ("x", "y", "ra", "dec", "mag", "flux", "snr")] + [("is_variable", bool)]
)
EDGE_PX = 10.0


@dataclass(frozen=True, slots=True)
class InjectionConfig:
    """What to plant.

    Attributes
    ----------
    transients, variables
        Numbers per detector image.
    snr
        Range of expected signal-to-noise in the image, logarithmically even.
    near_part
        Part of the transients within a few pixels of a detected source.
    apart_fwhm
        Least distance between fakes.
    """

    transients: int = 10
    variables: int = 0
    snr: tuple[float, float] = (4.0, 100.0)
    near_part: float = 0.4
    apart_fwhm: float = 8.0


def seed_of(*names: object) -> np.random.Generator:
    """Random numbers that belong to names (visit, detector), so that a replay plants the same."""
    digest = hashlib.sha256("\x1f".join(str(name) for name in names).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def is_chosen(visit: int, fraction: float) -> bool:
    """Whether a visit carries fakes: the same answer in every process, for all its detectors."""
    return fraction > 0 and float(seed_of("injected visit", visit).uniform()) < fraction


def plan(
    exposure: Exposure, rng: np.random.Generator, config: InjectionConfig | None = None
) -> NDArray[np.void]:
    """Places and fluxes of fakes for one calibrated image.

    Returns
    -------
    Structured array of ``FAKE_DTYPE``: pixels, ICRS degrees, magnitude of \\|flux\\|, flux in the image's unit
    (negative for a variable that faded), expected signal-to-noise.

    Raises
    ------
    UnprocessableDataError
        The image has no PSF.
    """
    config = config or InjectionConfig()
    psf = exposure.psf
    if not isinstance(psf, PsfModel):
        raise UnprocessableDataError("injection: the image has no PSF; calibrate it first")
    ny, nx = exposure.shape
    stars = exposure.metadata.get("stars")
    rows: list[tuple[float, float, float, bool]] = []
    taken: list[tuple[float, float]] = []
    good = exposure.variance[(exposure.mask & MaskPlane.unusable()) == 0]
    sky = float(np.median(good[::7])) if good.size else 1.0
    sigma = float(np.sqrt(sky * psf.effective_area(nx / 2, ny / 2)))

    def is_free(x: float, y: float) -> bool:
        if not (EDGE_PX < x < nx - 1 - EDGE_PX and EDGE_PX < y < ny - 1 - EDGE_PX):
            return False
        box = exposure.mask[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2]
        if (box & np.uint16(MaskPlane.unusable() | MaskPlane.CR)).any():
            return False
        return all(np.hypot(x - a, y - b) > config.apart_fwhm * psf.fwhm_px for a, b in taken)

    known = stars if isinstance(stars, np.ndarray) and len(stars) else None
    low, high = np.log(config.snr[0]), np.log(config.snr[1])
    for is_variable, wanted in ((True, config.variables), (False, config.transients)):
        done = 0
        for _ in range(20 * wanted):
            if done == wanted:
                break
            snr = float(np.exp(rng.uniform(low, high)))
            host = known[int(rng.integers(len(known)))] if known is not None else None
            if is_variable:
                if host is None or not host["flux"] > 0 or host["bits"] & MaskPlane.SAT:
                    continue
                x, y = float(host["x"]), float(host["y"])
                part = rng.choice([-1.0, 1.0]) * np.exp(rng.uniform(np.log(0.03), np.log(0.7)))
                flux = float(part * host["flux"])
                snr = abs(flux) / float(np.sqrt(sigma**2 + host["flux"]))
                if not config.snr[0] < snr < 5 * config.snr[1]:
                    continue
            else:
                if host is not None and rng.uniform() < config.near_part:
                    reach = rng.rayleigh(1.5 * psf.fwhm_px)
                    angle = rng.uniform(0, 2 * np.pi)
                    x, y = (
                        float(host["x"] + reach * np.cos(angle)),
                        float(host["y"] + reach * np.sin(angle)),
                    )
                else:
                    x, y = float(rng.uniform(0, nx)), float(rng.uniform(0, ny))
                flux = snr * snr / 2 + np.sqrt(snr**4 / 4 + (snr * sigma) ** 2)
            if is_free(x, y):
                rows.append((x, y, float(flux), is_variable))
                taken.append((x, y))
                done += 1
    out = np.zeros(len(rows), FAKE_DTYPE)
    if rows:
        out["x"], out["y"], out["flux"], out["is_variable"] = (np.array(c) for c in zip(*rows, strict=True))
        out["snr"] = np.abs(out["flux"]) / np.sqrt(sigma**2 + np.maximum(out["flux"], 0))
        out["mag"] = exposure.zero_point - 2.5 * np.log10(np.abs(out["flux"]))
        out["ra"], out["dec"] = sky_of(exposure.wcs, out["x"], out["y"])
    return out


def plant(exposure: Exposure, fakes: NDArray[Any], rng: np.random.Generator) -> Exposure:
    """A copy of a calibrated image with fakes, their photon noise and the INJECTED bit about them."""
    image, variance, mask = exposure.image.copy(), exposure.variance.copy(), exposure.mask.copy()
    ny, nx = exposure.shape
    for fake in fakes:
        stamp = exposure.psf.stamp(float(fake["x"]), float(fake["y"])).astype(np.float64) * float(
            fake["flux"]
        )
        half = stamp.shape[0] // 2
        x, y = int(np.floor(fake["x"] + 0.5)), int(np.floor(fake["y"] + 0.5))
        y0, y1, x0, x1 = max(y - half, 0), min(y + half + 1, ny), max(x - half, 0), min(x + half + 1, nx)
        piece = stamp[y0 - y + half : y1 - y + half, x0 - x + half : x1 - x + half]
        light = np.maximum(piece, 0)
        box = np.s_[y0:y1, x0:x1]
        image[box] += (piece + rng.normal(0, 1, piece.shape) * np.sqrt(light)).astype(np.float32)
        variance[box] += light.astype(np.float32)
        near = max(1, round(exposure.psf.fwhm_px))
        mask[max(y - near, 0) : y + near + 1, max(x - near, 0) : x + near + 1] |= np.uint16(
            MaskPlane.INJECTED
        )
    return replace(exposure, image=image, variance=variance, mask=mask, metadata=dict(exposure.metadata))


def recovered(
    fakes: NDArray[Any], sources: NDArray[Any], *, reliable: float, radius_px: float
) -> NDArray[np.bool_]:
    """Which fakes have a source of their sign, of at least the given reliability, within ``radius_px``."""
    out = np.zeros(len(fakes), bool)
    good = sources[sources["reliability"] >= reliable]
    for k, fake in enumerate(fakes):
        near = np.hypot(good["x"] - fake["x"], good["y"] - fake["y"]) < radius_px
        out[k] = bool((near & (good["isNegative"] == (fake["flux"] < 0))).any())
    return out
