"""Rows of the Butler's registry, made from descriptions and from headers. Nothing here writes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.core.geometry import detector_corners
from cumbre.core.header import CALIBRATION_TYPES, ObservationMetadata
from cumbre.core.header_time import tai_ns_from_utc_ns
from cumbre.core.instrument import Instrument
from cumbre.core.time import day_obs_start_tai

if TYPE_CHECKING:
    from lsst.daf.butler import Timespan
    from lsst.sphgeom import ConvexPolygon

NS = 1_000_000_000
UNKNOWN = "unknown"
ONE_TO_ONE = 0
BY_GROUP = 2
VISIT_SYSTEMS = {ONE_TO_ONE: "one-to-one", BY_GROUP: "by-seq-start-end"}
"""Numbers and names as in Rubin's registries."""
_MAX_ID = 1 << 41
Row = dict[str, Any]


def instrument_records(instrument: Instrument, class_name: str) -> dict[str, list[Row]]:
    """Rows that describe a camera, by dimension, in the order in which they must be written."""
    name = instrument.name
    filters = {item.name: item.band for item in instrument.filters} | {UNKNOWN: UNKNOWN}
    return {
        "instrument": [
            {
                "name": name,
                "visit_max": _MAX_ID,
                "exposure_max": _MAX_ID,
                "detector_max": max(d.id for d in instrument.detectors) + 1,
                "visit_system": ONE_TO_ONE,
                "class_name": class_name,
            }
        ],
        "detector": [
            {
                "instrument": name,
                "id": detector.id,
                "full_name": detector.name,
                "name_in_raft": detector.name.partition("_")[2] or detector.name,
                "raft": detector.name.partition("_")[0],
                "purpose": detector.purpose,
            }
            for detector in instrument.detectors
        ],
        "physical_filter": [
            {"instrument": name, "name": physical, "band": band} for physical, band in filters.items()
        ],
        "visit_system": [
            {"instrument": name, "id": number, "name": text} for number, text in VISIT_SYSTEMS.items()
        ],
    }


def timespan(begin_ns: int, end_ns: int) -> Timespan:
    """Half-open span of TAI nanoseconds; an instant becomes one nanosecond."""
    from lsst.daf.butler import Timespan
    from lsst.daf.butler.time_utils import TimeConverter

    convert = TimeConverter().nsec_to_astropy
    return Timespan(convert(begin_ns), convert(max(end_ns, begin_ns + 1)))


def _maybe(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def sees_sky(metadata: ObservationMetadata) -> bool:
    """Whether the shutter was open to the sky."""
    return metadata.image_type not in CALIBRATION_TYPES


def exposure_records(metadata: ObservationMetadata) -> dict[str, Row]:
    """Rows of one exposure, by dimension, in the order in which they must be written."""
    name = metadata.instrument
    start = round(day_obs_start_tai(metadata.day_obs)) * NS
    # A day_obs may hold a leap second, so its end is computed and not start + 86400 s.
    day_end = tai_ns_from_utc_ns(_utc_of_tai(start) + 86400 * NS)
    physical = metadata.filter or UNKNOWN
    out: dict[str, Row] = {
        "day_obs": {"instrument": name, "id": metadata.day_obs, "timespan": timespan(start, day_end)},
        "group": {"instrument": name, "name": metadata.group_id[:64]},
    }
    if not metadata.band:
        out["physical_filter"] = {"instrument": name, "name": physical, "band": UNKNOWN}
    out["exposure"] = {
        "instrument": name,
        "id": metadata.exposure_id,
        "day_obs": metadata.day_obs,
        "group": metadata.group_id[:64],
        "physical_filter": physical,
        "obs_id": metadata.obs_id,
        "exposure_time": float(metadata.exposure_s),
        "dark_time": float(metadata.dark_s),
        "observation_type": metadata.image_type[:16],
        "observation_reason": metadata.reason[:68],
        "seq_num": metadata.seq_num,
        "seq_start": metadata.visit_id % 100000,
        "seq_end": metadata.visit_id % 100000 + metadata.sequence_length - 1,
        "target_name": metadata.object[:64] or UNKNOWN,
        "science_program": metadata.program[:64] or UNKNOWN,
        "tracking_ra": _maybe(metadata.ra_deg),
        "tracking_dec": _maybe(metadata.dec_deg),
        "sky_angle": _maybe(metadata.rotpa_deg),
        "azimuth": _maybe(metadata.azimuth_deg),
        "zenith_angle": _maybe(metadata.zenith_angle_deg),
        "has_simulated": False,
        "can_see_sky": sees_sky(metadata),
        "timespan": timespan(metadata.begin_ns, metadata.end_ns),
    }
    return out


def _utc_of_tai(tai_ns: int) -> int:
    from cumbre.core.header_time import utc_ns_from_tai_ns

    return utc_ns_from_tai_ns(tai_ns)


def polygon(ra_deg: Any, dec_deg: Any) -> ConvexPolygon:
    """Convex hull of points on the sky (degrees)."""
    from lsst.sphgeom import ConvexPolygon, LonLat, UnitVector3d

    return ConvexPolygon(
        [
            UnitVector3d(LonLat.fromDegrees(float(ra), float(dec)))
            for ra, dec in zip(np.ravel(ra_deg), np.ravel(dec_deg), strict=True)
        ]
    )


def visit_records(
    instrument: Instrument, exposure: Row, *, visit: int, name: str, system: int
) -> dict[str, list[Row]]:
    """Rows of a visit with its region and those of all its detectors.

    Parameters
    ----------
    exposure
        The (first) exposure's row; it must have a position. A missing ``sky_angle`` counts as 0.
    visit, name
        Number and name of the visit.
    system
        A key of ``VISIT_SYSTEMS``.
    """
    ra, dec = exposure["tracking_ra"], exposure["tracking_dec"]
    rotpa = exposure["sky_angle"] or 0.0
    corners = {d.id: detector_corners(instrument, d, ra, dec, rotpa) for d in instrument.detectors}
    every_ra = np.concatenate([np.ravel(pair[0]) for pair in corners.values()])
    every_dec = np.concatenate([np.ravel(pair[1]) for pair in corners.values()])
    key = {"instrument": instrument.name, "visit": visit}
    copied = (
        "instrument", "day_obs", "physical_filter", "seq_num", "exposure_time", "target_name",
        "observation_reason", "science_program", "azimuth", "zenith_angle", "timespan",
    )  # fmt: skip
    return {
        "visit": [
            {field: exposure[field] for field in copied}
            | {"id": visit, "name": name, "region": polygon(every_ra, every_dec)}
        ],
        "visit_definition": [key | {"exposure": exposure["id"]}],
        "visit_system_membership": [key | {"visit_system": system}],
        "visit_detector_region": [
            key | {"detector": number, "region": polygon(*pair)} for number, pair in corners.items()
        ],
    }
