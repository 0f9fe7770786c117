"""Rows of Level 1 tables and alert packets from measured difference sources (names of schema v11.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.ids import source_id
from cumbre.payloads.exposure import MaskPlane
from cumbre.payloads.kernels.classify import VERSION
from cumbre.payloads.processing import DifferenceResult

if TYPE_CHECKING:
    from cumbre.alerts.encode import EncodedRows

STAMP_HALF = 15
TRAIL_ALGORITHM = 1
"""The local PSF drawn out along a line, fitted to the difference."""
_LOBE_FLUXES = (
    "dipoleMeanFlux", "dipoleMeanFluxErr", "dipoleFluxDiff", "dipoleFluxDiffErr", "trailFlux", "trailFluxErr",
)  # fmt: skip
_LOBE_NUMBERS = (
    "dipoleLength", "dipoleAngle", "dipoleChi2", "trailRa", "trailRaErr", "trailDec", "trailDecErr", "trailLength",
    "trailLengthErr", "trailAngle", "trailAngleErr", "trailChi2",
)  # fmt: skip
_BLOCK = 2880
_FLAG_COLUMNS = {
    "pixelFlags_bad": (int(MaskPlane.BAD), False),
    "pixelFlags_cr": (int(MaskPlane.CR), False),
    "pixelFlags_crCenter": (int(MaskPlane.CR), True),
    "pixelFlags_edge": (int(MaskPlane.EDGE), False),
    "pixelFlags_nodata": (int(MaskPlane.NO_DATA), False),
    "pixelFlags_nodataCenter": (int(MaskPlane.NO_DATA), True),
    "pixelFlags_interpolated": (int(MaskPlane.INTRP), False),
    "pixelFlags_interpolatedCenter": (int(MaskPlane.INTRP), True),
    "pixelFlags_saturated": (int(MaskPlane.SAT | MaskPlane.SAT_TEMPLATE), False),
    "pixelFlags_saturatedCenter": (int(MaskPlane.SAT | MaskPlane.SAT_TEMPLATE), True),
    "pixelFlags_suspect": (int(MaskPlane.SUSPECT), False),
    "pixelFlags_suspectCenter": (int(MaskPlane.SUSPECT), True),
    "pixelFlags_streak": (int(MaskPlane.STREAK), False),
    "pixelFlags_streakCenter": (int(MaskPlane.STREAK), True),
    "pixelFlags_injected": (int(MaskPlane.INJECTED), False),
    "pixelFlags_injectedCenter": (int(MaskPlane.INJECTED), True),
}


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What all sources of one detector image share.

    ``flux_scale`` turns image units into nJy (1 leaves them as they are, when there is no zero point).
    """

    visit: int
    detector: int
    band: str
    midpoint_mjd_tai: float
    exposure_s: float
    processed_mjd_tai: float
    flux_scale: float = 1.0
    reliability_version: str = VERSION


def _number(value: Any, scale: float = 1.0) -> float | None:
    """A finite number, or null: packets carry no placeholders."""
    number = float(value) * scale
    return number if math.isfinite(number) else None


def _lobes(row: Any, scale: float) -> dict[str, Any]:
    """Columns of dipole and trail: null where none was fitted, or where the fit says nothing."""
    out: dict[str, Any] = {name: _number(row[name], scale) for name in _LOBE_FLUXES}
    out |= {name: _number(row[name]) for name in _LOBE_NUMBERS}
    is_trail = bool(row["flagTrailFit"])
    return out | {
        "dipoleNdata": int(row["dipoleNPix"]),
        "dipoleFitAttempted": bool(row["flagDipoleFit"]),
        "trailNdata": int(row["trailNPix"]),
        "trailAlgorithm": TRAIL_ALGORITHM if row["trailNPix"] > 0 else None,
        "trail_flag": bool(row["flagTrail"]) if is_trail else None,
        "trail_flag_edge": bool(row["flagTrailEdge"]) if is_trail else None,
    }


def dia_source(row: Any, context: SourceContext, counter: int) -> dict[str, Any]:
    """One DiaSource row from one element of the sources array.

    Parameters
    ----------
    row
        Element of an array of ``processing.SOURCE_DTYPE``.
    counter
        Number of the source in its detector image, part of its id.
    """
    scale = context.flux_scale
    bits, centre = int(row["pixelFlags"]), int(row["pixelFlagsCentre"])
    out: dict[str, Any] = {
        "diaSourceId": source_id(context.visit, context.detector, counter),
        "visit": context.visit,
        "detector": context.detector,
        "diaObjectId": None,
        "ssObjectId": None,
        "parentDiaSourceId": None,
        "midpointMjdTai": context.midpoint_mjd_tai,
        "exposureTime": _number(context.exposure_s),
        "ra": float(row["ra"]),
        "raErr": _number(row["raErr"]),
        "dec": float(row["dec"]),
        "decErr": _number(row["decErr"]),
        "x": float(row["x"]),
        "xErr": _number(row["xErr"]),
        "y": float(row["y"]),
        "yErr": _number(row["yErr"]),
        "centroid_flag": bool(row["flagCentroid"]),
        "apFlux": _number(row["apFlux"], scale),
        "apFluxErr": _number(row["apFluxErr"], scale),
        "isNegative": bool(row["isNegative"]),
        "snr": _number(row["snr"]),
        "psfFlux": _number(row["psfFlux"], scale),
        "psfFluxErr": _number(row["psfFluxErr"], scale),
        "psfChi2": _number(row["psfChi2"] * max(int(row["nPix"]) - 3, 1)),
        "psfNdata": int(row["nPix"]),
        "psfFlux_flag": not math.isfinite(float(row["psfFluxErr"])),
        "scienceFlux": _number(row["scienceFlux"], scale),
        "scienceFluxErr": _number(row["scienceFluxErr"], scale),
        "templateFlux": _number(row["templateFlux"], scale),
        "templateFluxErr": _number(row["templateFluxErr"], scale),
        "reliability": _number(row["reliability"]),
        "reliabilityVersion": context.reliability_version,
        "band": context.band or None,
        "isDipole": bool(row["isDipole"]),
        "glint_trail": bool(row["flagGlintTrail"]),
        **_lobes(row, scale),
        "bboxSize": 2 * STAMP_HALF + 1,
        "timeProcessedMjdTai": context.processed_mjd_tai,
        "timeWithdrawnMjdTai": None,
        "pixelFlags": bits != 0,
        "pixelFlags_offimage": False,
    }
    for name, (plane, is_centre) in _FLAG_COLUMNS.items():
        out[name] = bool((centre if is_centre else bits) & plane)
    return out


def stamp_bytes(
    stamp: NDArray[np.float32], *, unit: str = "nJy", cards: dict[str, float] | None = None
) -> bytes:
    """A float image as a one-HDU FITS file; a hundred times faster than a general FITS writer.

    Parameters
    ----------
    stamp
        (ny, nx); NaN where there are no pixels.
    cards
        Further numeric keywords (WCS).
    """
    lines = [
        f"{'SIMPLE':<8}= {'T':>20}", f"{'BITPIX':<8}= {-32:>20}", f"{'NAXIS':<8}= {2:>20}",
        f"{'NAXIS1':<8}= {stamp.shape[1]:>20}", f"{'NAXIS2':<8}= {stamp.shape[0]:>20}", f"{'BUNIT':<8}= '{unit:<8}'",
    ]  # fmt: skip
    for key, value in (cards or {}).items():
        text = f"'{value:<8}'" if isinstance(value, str) else f"{value:>20.13G}"
        lines.append(f"{key:<8}= {text}")
    header = "".join(f"{line:<80}" for line in [*lines, "END"])
    header += " " * (-len(header) % _BLOCK)
    data = np.ascontiguousarray(stamp, dtype=">f4").tobytes()
    return header.encode("ascii") + data + b"\0" * (-len(data) % _BLOCK)


def _stamp_wcs(wcs: Any, x: float, y: float, half: int) -> dict[str, Any]:
    """Linear TAN keywords of a stamp; nothing without a WCS."""
    from cumbre.payloads.processing import sky_of

    ra, dec = sky_of(wcs, np.array([x, x + 1, x]), np.array([y, y, y + 1]))
    if not np.isfinite(ra + dec).all():
        return {}
    turn = (ra - ra[0] + 180) % 360 - 180
    east = turn * math.cos(math.radians(float(dec[0])))
    return {
        "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": float(ra[0]), "CRVAL2": float(dec[0]),
        "CRPIX1": half + 1 + x - round(x), "CRPIX2": half + 1 + y - round(y),
        "CD1_1": float(east[1]), "CD1_2": float(east[2]), "CD2_1": float(dec[1] - dec[0]), "CD2_2": float(dec[2] - dec[0]),
    }  # fmt: skip


def stamps_of(
    result: DifferenceResult, x: float, y: float, *, unit: str = "nJy", scale: float = 1.0
) -> dict[str, bytes]:
    """``cutoutDifference``, ``cutoutScience``, ``cutoutTemplate`` of 31 × 31 pixels as FITS bytes."""
    planes = result.stamps(x, y, STAMP_HALF)
    cards = _stamp_wcs(result.exposure.wcs, x, y, STAMP_HALF)
    return {
        f"cutout{name.capitalize()}": stamp_bytes(plane * np.float32(scale), unit=unit, cards=cards)
        for name, plane in planes.items()
    }


def alert(
    source: dict[str, Any],
    *,
    dia_object: dict[str, Any] | None = None,
    previous: list[dict[str, Any]] | EncodedRows | None = None,
    forced: list[dict[str, Any]] | EncodedRows | None = None,
    stamps: dict[str, bytes] | None = None,
    ss_source: dict[str, Any] | None = None,
    mpc_orbits: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One alert packet as a record of schema v11.1."""
    return {
        "diaSourceId": source["diaSourceId"],
        "observation_reason": None,
        "target_name": None,
        "diaSource": source,
        "prvDiaSources": previous,
        "prvDiaForcedSources": forced,
        "diaObject": dia_object,
        "ssSource": ss_source,
        "mpc_orbits": mpc_orbits,
        "cutoutDifference": (stamps or {}).get("cutoutDifference"),
        "cutoutScience": (stamps or {}).get("cutoutScience"),
        "cutoutTemplate": (stamps or {}).get("cutoutTemplate"),
    }
