"""Which sources are known objects: mutual nearest neighbours of the predicted places, and SSSource rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cumbre.payloads.association import associate, unit_vectors
from cumbre.payloads.solar_system.kepler import AU_KM, ecliptic_from_equatorial
from cumbre.payloads.solar_system.night import Places

RADIUS_ARCSEC = 1.0
KM_S = AU_KM / 86400.0
_GALACTIC = np.array(
    [
        [-0.0548755604162154, -0.8734370902348850, -0.4838350155487132],
        [0.4941094278755837, -0.4448296299600112, 0.7469822444972189],
        [-0.8676661490190047, -0.1980763734312015, 0.4559837761750669],
    ]
)
"""ICRS to galactic (ESA SP-1200, 1.5.3)."""


@dataclass(frozen=True, slots=True)
class KnownObjects:
    """What an image needs of the objects that may be in it.

    ``places`` at the middle of the exposure; ``orbits`` gives rows of ``mpc_orbits`` by ``ssObjectId``.
    """

    places: Places
    orbits: Callable[[Collection[int]], Mapping[int, Mapping[str, Any]]]


def attribute(sources: Sequence[dict[str, Any]], known: KnownObjects) -> list[dict[str, Any]]:
    """Give the sources that are a known object its ``ssObjectId``.

    Parameters
    ----------
    sources
        DiaSource rows; changed in place. Negative ones are what a template held at the place, never the object.
    known
        Objects in and around the image.

    Returns
    -------
    Rows of SSSource, ``designation`` left out.
    """
    places = known.places
    positive = [source for source in sources if not source.get("isNegative")]
    if not len(places) or not positive:
        return []
    index, _ = associate(
        [s["ra"] for s in positive], [s["dec"] for s in positive], places.ra, places.dec, radius_arcsec=RADIUS_ARCSEC
    )  # fmt: skip
    rows = []
    for source, at in zip(positive, index.tolist(), strict=True):
        if at >= 0:
            source["ssObjectId"] = int(places.ids[at])
            rows.append(_row(source, places.take(slice(at, at + 1))))
    return rows


def named(rows: Sequence[dict[str, Any]], orbits: Mapping[int, Mapping[str, Any]]) -> None:
    """Put the designations of the objects into SSSource rows."""
    for row in rows:
        orbit = orbits.get(row["ssObjectId"])
        row["designation"] = None if orbit is None else orbit["designation"]


def _row(source: Mapping[str, Any], place: Places) -> dict[str, Any]:
    """Units: degrees, au, km/s, degrees a day, arc seconds; offsets are observed minus predicted."""
    ra, dec = float(place.ra[0]), float(place.dec[0])
    seen = unit_vectors([source["ra"]], [source["dec"]])
    ecliptic, galactic = _angles(ecliptic_from_equatorial(seen)[0]), _angles(_GALACTIC @ seen[0])
    helio, topo = place.helio[0].copy(), place.topo[0].copy()
    helio[3:] *= KM_S
    topo[3:] *= KM_S
    east = 3600 * ((source["ra"] - ra + 180) % 360 - 180) * math.cos(math.radians(dec))
    north = 3600 * (source["dec"] - dec)
    rate_ra, rate_dec = float(place.ra_rate[0]), float(place.dec_rate[0])
    rate = math.hypot(rate_ra, rate_dec)
    along = (east * rate_ra + north * rate_dec) / rate if rate else None
    across = (north * rate_ra - east * rate_dec) / rate if rate else None
    out: dict[str, Any] = {
        "diaSourceId": source["diaSourceId"],
        "ssObjectId": int(place.ids[0]),
        "eclLambda": ecliptic[0], "eclBeta": ecliptic[1], "galLon": galactic[0], "galLat": galactic[1],
        "elongation": float(place.elongation[0]),
        "phaseAngle": float(place.phase_angle[0]),
        "topoRange": float(np.linalg.norm(topo[:3])),
        "topoRangeRate": float(topo[:3] @ topo[3:] / np.linalg.norm(topo[:3])),
        "helioRange": float(np.linalg.norm(helio[:3])),
        "helioRangeRate": float(helio[:3] @ helio[3:] / np.linalg.norm(helio[:3])),
        "ephRa": ra, "ephDec": dec,
        "ephVmag": float(place.v_mag[0]) if math.isfinite(place.v_mag[0]) else None,
        "ephRate": rate, "ephRateRa": rate_ra, "ephRateDec": rate_dec,
        "ephOffset": math.hypot(east, north), "ephOffsetRa": east, "ephOffsetDec": north,
        "ephOffsetAlongTrack": along, "ephOffsetCrossTrack": across,
        "helio_vtot": float(np.linalg.norm(helio[3:])), "topo_vtot": float(np.linalg.norm(topo[3:])),
        "diaDistanceRank": 1,
    }  # fmt: skip
    for name, vector in (("helio", helio), ("topo", topo)):
        for axis, value in zip(("x", "y", "z", "vx", "vy", "vz"), vector.tolist(), strict=True):
            out[f"{name}_{axis}"] = value
    return out


def _angles(vector: Any) -> tuple[float, float]:
    x, y, z = (float(v) for v in vector)
    return math.degrees(math.atan2(y, x)) % 360, math.degrees(math.atan2(z, math.hypot(x, y)))
