"""Exposures as files: one FITS file with image, variance, mask, PSF, WCS and numbers, written atomically.

HDUs: primary (header only: WCS, zero point, metadata as JSON), IMAGE, VARIANCE, MASK, DEPTH (of templates: images used
at each pixel), PSF (coefficients). The planes are stored whole and uncompressed: templates are read in the minute before
a visit, and 4k x 4k planes then cost the disk's time only.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.payloads.exposure import Exposure

FORMAT = "CUMBRE-EXPOSURE-1"


def save_exposure(exposure: Exposure, path: str | Path) -> None:
    """Write an exposure atomically.

    Of the metadata numbers and texts are kept, the table of the calibration's ``stars``, and a template's ``depth``.
    """
    import fitsio

    from cumbre.stores.files import write_atomic

    plain = {k: v for k, v in exposure.metadata.items() if isinstance(v, str | int | float | bool | None)}
    about: dict[str, Any] = {
        "metadata": plain,
        "metrics": {k: float(v) for k, v in exposure.metrics.items()},
        "is_background_subtracted": exposure.is_background_subtracted,
    }
    header: list[dict[str, Any]] = [{"name": "FORMAT", "value": FORMAT}]
    if math.isfinite(exposure.zero_point):
        header.append(
            {"name": "MAGZERO", "value": float(exposure.zero_point), "comment": "AB mag of 1 electron"}
        )
        header.append({"name": "MAGZERR", "value": _finite(exposure.zero_point_err)})
    if exposure.wcs is not None:
        header += [{"name": k, "value": v} for k, v in exposure.wcs.to_header(exposure.shape).items()]
    text = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    with fitsio.FITS("mem://", "rw") as fits:
        fits.write(None, header=header)
        planes: dict[str, Any] = {
            "IMAGE": exposure.image,
            "VARIANCE": exposure.variance,
            "MASK": exposure.mask,
        }
        depth = exposure.metadata.get("depth")
        if isinstance(depth, np.ndarray) and depth.shape == exposure.shape:
            planes["DEPTH"] = depth
        if exposure.psf is not None:
            planes["PSF"] = exposure.psf.coefficients
        stars = exposure.metadata.get("stars")
        if isinstance(stars, np.ndarray) and stars.dtype.names:
            fits.write_table(stars, extname="STARS")
            fits[-1].write_checksum()
        planes["ABOUT"] = text  # last: a file cut short anywhere lacks it
        for name, plane in planes.items():
            fits.write(np.ascontiguousarray(plane), extname=name)
            fits[-1].write_checksum()
        if exposure.psf is not None:
            for key, value in (
                ("PSFNY", exposure.psf.shape[0]),
                ("PSFNX", exposure.psf.shape[1]),
                ("FWHM", float(exposure.psf.fwhm_px)),
                ("NSTARS", int(exposure.psf.n_stars)),
                ("RESIDUAL", _finite(exposure.psf.residual)),
            ):
                fits["PSF"].write_key(key, value)
        content = bytes(fits.read_raw())
    write_atomic(Path(path), content)


def _depth(fits: Any, names: list[str]) -> dict[str, Any]:
    return {"depth": fits["DEPTH"].read()} if "DEPTH" in names else {}


def _stars(fits: Any, names: list[str]) -> dict[str, Any]:
    if "STARS" not in names:
        return {}
    table = fits["STARS"].read()
    return {"stars": table.astype(table.dtype.newbyteorder("="))}


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else -1.0


def load_about(path: str | Path) -> dict[str, Any]:
    """Read ``metadata`` and ``metrics`` only.

    Raises
    ------
    BadFileError
        Not such a file, or damaged.
    """
    import fitsio

    try:
        with fitsio.FITS(str(path)) as fits:
            about: dict[str, Any] = json.loads(fits["ABOUT"].read().tobytes())
    except (OSError, ValueError) as error:
        raise BadFileError(f"{path}: not readable as an exposure: {error}") from error
    return about


def load_exposure(path: str | Path) -> Exposure:
    """Read a file of :func:`save_exposure`.

    Raises
    ------
    NotFoundError
        No such file.
    BadFileError
        Not such a file, or damaged.
    """
    import fitsio

    from cumbre.payloads.kernels.psf import PsfModel
    from cumbre.payloads.kernels.wcs import PlaneWcs

    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"{path}: there is no such file")
    try:
        with fitsio.FITS(str(path)) as fits:
            header = dict(fits[0].read_header())
            if header.get("FORMAT") != FORMAT:
                raise BadFileError(f"{path}: FORMAT = {header.get('FORMAT')!r}: expected {FORMAT}")
            names = [hdu.get_extname() for hdu in fits]
            about = json.loads(fits["ABOUT"].read().tobytes())
            psf = None
            if "PSF" in names:
                keys = fits["PSF"].read_header()
                psf = PsfModel(
                    fits["PSF"].read().astype(np.float32),
                    (int(keys["PSFNY"]), int(keys["PSFNX"])),
                    float(keys["FWHM"]),
                    int(keys["NSTARS"]),
                    float(keys["RESIDUAL"]),
                )
            exposure = Exposure(
                image=fits["IMAGE"].read().astype(np.float32, copy=False),
                variance=fits["VARIANCE"].read().astype(np.float32, copy=False),
                mask=fits["MASK"].read().astype(np.uint16, copy=False),
                wcs=PlaneWcs.from_header(header) if "CRVAL1" in header else None,
                psf=psf,
                zero_point=float(header.get("MAGZERO", math.nan)),
                zero_point_err=float(header.get("MAGZERR", math.nan)),
                is_background_subtracted=bool(about["is_background_subtracted"]),
                metadata=about["metadata"] | _stars(fits, names) | _depth(fits, names),
                metrics=about["metrics"],
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFileError(f"{path}: not readable as an exposure: {error}") from error
    if not exposure.image.shape == exposure.variance.shape == exposure.mask.shape:
        raise BadFileError(f"{path}: image, variance and mask have different shapes")
    return exposure
