"""Other programs on the pixels that ``cumbre benchmark alerts`` left: processor seconds of one step each.

A script of its own that needs no cumbre, so that the peers may live in another environment:
``python benchmark_peers.py NAME FOLDER`` prints a number, or the text "not installed"; ``list`` names them. A peer too
slow for the whole image gets a part of it, and its time is scaled by pixels; its name says so.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _planes(folder: Path) -> tuple[Any, Any, Any, dict[str, float]]:
    import numpy as np
    from astropy.io import fits

    science = fits.getdata(folder / "science.fits").astype(np.float32)
    template = fits.getdata(folder / "template.fits").astype(np.float32)
    return science, template, np.load(folder / "mask.npy"), json.loads((folder / "about.json").read_text())


def _timed(function: Callable[[], Any]) -> float:
    begun = time.process_time()
    function()
    return time.process_time() - begun


def _program(command: list[str], folder: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def astroscrappy(folder: Path) -> float:
    """Cosmic rays, one iteration of L.A.Cosmic."""
    import astroscrappy

    science, _, mask, about = _planes(folder)
    return _timed(
        lambda: astroscrappy.detect_cosmics(science + about["level"], inmask=mask, readnoise=6.0, niter=1)
    )


def photutils_background(folder: Path) -> float:
    """Background map."""
    from photutils.background import Background2D

    science, _, mask, _ = _planes(folder)
    return _timed(lambda: Background2D(science, 64, mask=mask).background)


def photutils_sources(folder: Path) -> float:
    """Detection above a threshold without deblending."""
    from photutils.segmentation import detect_sources

    science, _, mask, about = _planes(folder)
    return _timed(lambda: detect_sources(science, 5 * about["noise"], 5, mask=mask))


def reproject_interp(folder: Path) -> float:
    """One plane resampled from a WCS to another."""
    from astropy.io import fits
    from astropy.wcs import WCS
    from reproject import reproject_interp

    with fits.open(folder / "science.fits") as hdus:
        header = hdus[0].header.copy()
        target = WCS(header).deepcopy()
        target.wcs.crval = target.wcs.crval + 1e-4
        data = hdus[0].data.astype("f4")
        return _timed(
            lambda: reproject_interp((data, WCS(header)), target, shape_out=data.shape, order="bicubic")
        )


def properimage_scaled(folder: Path) -> float:
    """ZOGY on 1024 x 1024 pixels, times 16."""
    from properimage import SingleImage
    from properimage.operations import subtract

    science, template, mask, _ = _planes(folder)
    cut = slice(1024, 2048)
    new, old = (
        SingleImage(plane[cut, cut].astype(float), mask=mask[cut, cut], stamp_shape=(25, 25))
        for plane in (science, template)
    )
    return 16 * _timed(lambda: subtract(ref=old, new=new, align=False, beta=False))


def ois_scaled(folder: Path) -> float:
    """Alard-Lupton with a constant kernel on 512 x 512 pixels, times 64."""
    import ois

    science, template, _, _ = _planes(folder)
    cut = slice(1024, 1536)
    new, old = science[cut, cut].astype(float), template[cut, cut].astype(float)
    return 64 * _timed(lambda: ois.optimal_system(new, old, kernelshape=(11, 11), method="Bramich"))


def sfft_scaled(folder: Path) -> float:
    """SFFT on 1024 x 1024 pixels with its processor backend, times 16; it calls SExtractor under its old name."""
    import os

    program = shutil.which("source-extractor") or shutil.which("sex")
    if program is None:
        raise ImportError("source-extractor")
    (folder / "bin").mkdir(exist_ok=True)
    if not (folder / "bin" / "sex").exists():
        (folder / "bin" / "sex").symlink_to(program)
    os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    from astropy.io import fits
    from sfft.EasyCrowdedPacket import Easy_CrowdedPacket

    science, template, _, about = _planes(folder)
    cut = slice(1024, 2048)
    for name, plane in (("new", science), ("old", template)):
        header = fits.Header({"GAIN": 1.0, "SATURATE": 1e5})
        fits.writeto(folder / f"sfft_{name}.fits", plane[cut, cut], header, overwrite=True)
        fits.writeto(folder / f"sfft_{name}_m.fits", plane[cut, cut], header, overwrite=True)
    half = max(4, round(2 * about["fwhm_px"]))
    return 16 * _timed(
        lambda: Easy_CrowdedPacket.ECP(
            FITS_REF=str(folder / "sfft_old.fits"), FITS_SCI=str(folder / "sfft_new.fits"), ForceConv="REF",
            GKerHW=half, BGPolyOrder=0, KerPolyOrder=2, VERBOSE_LEVEL=0,
            BACKEND_4SUBTRACT="Numpy", NUM_CPU_THREADS_4SUBTRACT=1,
        )
    )  # fmt: skip


def source_extractor(folder: Path) -> float:
    """SExtractor: background, detection, deblending, aperture photometry, one process."""
    program = shutil.which("source-extractor") or shutil.which("sex")
    if program is None:
        raise ImportError("source-extractor")
    (folder / "se.param").write_text("X_IMAGE\nY_IMAGE\nFLUX_APER\nFLUX_AUTO\nFLAGS\n")
    (folder / "se.conv").write_text("CONV NORM\n1 2 1\n2 4 2\n1 2 1\n")
    return _program(
        [
            program, "science.fits", "-c", "/dev/null", "-PARAMETERS_NAME", "se.param", "-FILTER_NAME", "se.conv",
            "-CATALOG_NAME", "se.cat", "-DETECT_THRESH", "6", "-STARNNW_NAME", "/dev/null", "-VERBOSE_TYPE", "QUIET",
            "-MEMORY_PIXSTACK", "3000000", "-MEMORY_OBJSTACK", "30000",
        ],
        folder,
    )  # fmt: skip


def swarp(folder: Path) -> float:
    """SWarp: one plane resampled with Lanczos 3, one thread."""
    program = shutil.which("SWarp") or shutil.which("swarp")
    if program is None:
        raise ImportError("swarp")
    return _program(
        [
            program, "science.fits", "-c", "/dev/null", "-RESAMPLING_TYPE", "LANCZOS3", "-SUBTRACT_BACK", "N",
            "-COMBINE", "N", "-NTHREADS", "1", "-VERBOSE_TYPE", "QUIET", "-WRITE_XML", "N",
        ],
        folder,
    )  # fmt: skip


PEERS: dict[str, Callable[[Path], float]] = {
    "astroscrappy (cosmic rays)": astroscrappy,
    "photutils (background)": photutils_background,
    "photutils (detection)": photutils_sources,
    "reproject (one plane)": reproject_interp,
    "properimage (ZOGY, 1k scaled)": properimage_scaled,
    "ois (subtraction, 512 scaled)": ois_scaled,
    "sfft (subtraction, 1k scaled)": sfft_scaled,
    "SExtractor (detection)": source_extractor,
    "SWarp (one plane)": swarp,
}


def main() -> None:
    """Run one peer and print its seconds."""
    if sys.argv[1] == "list":
        print(json.dumps(list(PEERS)))
        return
    warnings.simplefilter("ignore")
    try:
        answer: Any = round(PEERS[sys.argv[1]](Path(sys.argv[2])), 3)
    except ImportError:
        answer = "not installed"
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
