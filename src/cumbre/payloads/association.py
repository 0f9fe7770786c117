"""Association of sources with known objects: mutual nearest neighbours on the sphere; object summaries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BANDS = ("u", "g", "r", "i", "z", "y")


def unit_vectors(ra: ArrayLike, dec: ArrayLike) -> NDArray[np.float64]:
    """(n, 3) unit vectors of ICRS degrees."""
    a, d = np.radians(np.asarray(ra, float)), np.radians(np.asarray(dec, float))
    return np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)], axis=-1)


def associate(
    ra: ArrayLike, dec: ArrayLike, ra_object: ArrayLike, dec_object: ArrayLike, *, radius_arcsec: float = 1.0
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Match sources to objects.

    A pair counts when each is the other's nearest and they are within the radius, so an object gets one source at
    most. Positions that are not finite match nothing.

    Parameters
    ----------
    ra, dec
        Sources, ICRS degrees, shape (n,).
    ra_object, dec_object
        Objects, ICRS degrees, shape (m,).

    Returns
    -------
    index, distance
        Shape (n,): the object's index or −1; the separation in arc seconds or NaN.
    """
    from scipy.spatial import cKDTree

    sources, objects = unit_vectors(ra, dec), unit_vectors(ra_object, dec_object)
    index = np.full(len(sources), -1, dtype=np.intp)
    distance = np.full(len(sources), np.nan)
    good, there = np.isfinite(sources).all(axis=1), np.isfinite(objects).all(axis=1)
    if not good.any() or not there.any():
        return index, distance
    at_source, at_object = np.flatnonzero(good), np.flatnonzero(there)
    to_object, nearest_object = cKDTree(objects[there]).query(sources[good])
    _, nearest_source = cKDTree(sources[good]).query(objects[there])
    chord = 2.0 * math.sin(math.radians(radius_arcsec / 3600.0) / 2.0)
    mutual = nearest_source[nearest_object] == np.arange(len(at_source))
    pair = mutual & (to_object <= chord)
    index[at_source[pair]] = at_object[nearest_object[pair]]
    distance[at_source[pair]] = np.degrees(2.0 * np.arcsin(np.minimum(to_object[pair] / 2.0, 1.0))) * 3600.0
    return index, distance


def summarise_object(
    identifier: int,
    sources: Sequence[Mapping[str, Any]],
    forced: Sequence[Mapping[str, Any]] = (),
    *,
    valid_from_mjd_tai: float,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The DiaObject row of all sources of one object.

    Parameters
    ----------
    sources, forced
        DiaSource and DiaForcedSource rows (names of schema v11.1), any order, the newest included.
    before
        The object's row so far: its count and first time are kept when the history given is shorter.

    Returns
    -------
    Row of DiaObject: weighted mean position, per band mean, error, scatter, extremes and steepest slope of psfFlux,
    means of forced and science fluxes; columns without data are null.
    """
    position = _position(sources)
    times = [float(s["midpointMjdTai"]) for s in sources]
    count, first = len(sources), min(times)
    if before is not None:
        count = max(count, int(before.get("nDiaSources") or 0) + 1)
        first = min(first, float(before.get("firstDiaSourceMjdTai") or first))
    row: dict[str, Any] = {
        "diaObjectId": identifier, "validityStartMjdTai": valid_from_mjd_tai, **position,
        "firstDiaSourceMjdTai": first, "lastDiaSourceMjdTai": max(times), "nDiaSources": count,
    }  # fmt: skip
    for band in BANDS:
        row |= _band(
            band, [s for s in sources if s.get("band") == band], [f for f in forced if f.get("band") == band]
        )
    return row


def _position(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ra0, dec0 = float(sources[0]["ra"]), float(sources[0]["dec"])
    weight, east, north = [], [], []
    for s in sources:
        error = max(float(s.get("raErr") or 0.1 / 3600), 1e-3 / 3600)
        weight.append(error**-2)
        east.append(((float(s["ra"]) - ra0 + 180) % 360 - 180) * math.cos(math.radians(dec0)))
        north.append(float(s["dec"]) - dec0)
    total = sum(weight)
    mean_east = sum(w * v for w, v in zip(weight, east, strict=True)) / total
    mean_north = sum(w * v for w, v in zip(weight, north, strict=True)) / total
    error = total**-0.5
    return {
        "ra": (ra0 + mean_east / max(math.cos(math.radians(dec0)), 1e-9)) % 360.0,
        "dec": dec0 + mean_north, "raErr": error, "decErr": error,
    }  # fmt: skip


def _mean(values: list[tuple[float, float]]) -> tuple[float, float] | None:
    """Weighted mean and its error of (value, error) pairs."""
    good = [(v, e) for v, e in values if math.isfinite(v) and math.isfinite(e) and e > 0]
    if not good:
        return None
    weights = [e**-2 for _, e in good]
    total = sum(weights)
    return sum(w * v for w, (v, _) in zip(weights, good, strict=True)) / total, total**-0.5


def _pairs(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [
        (float(r[name]), float(r[name + "Err"]))
        for r in rows
        if r.get(name) is not None and r.get(name + "Err") is not None
    ]


def _band(
    band: str, sources: Sequence[Mapping[str, Any]], forced: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    out: dict[str, Any] = {f"{band}_psfFluxNdata": 0}
    points = sorted(
        (float(s["midpointMjdTai"]), float(s["psfFlux"]), float(s["psfFluxErr"]))
        for s in sources
        if s.get("psfFlux") is not None and s.get("psfFluxErr") is not None
    )
    if points:
        fluxes = [f for _, f, _ in points]
        mean = _mean([(f, e) for _, f, e in points])
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points) if b[0] - a[0] > 1e-6]
        out |= {
            f"{band}_psfFluxNdata": len(points),
            f"{band}_psfFluxMin": min(fluxes),
            f"{band}_psfFluxMax": max(fluxes),
            f"{band}_psfFluxErrMean": sum(e for _, _, e in points) / len(points),
        }
        if mean is not None:
            out[f"{band}_psfFluxMean"], out[f"{band}_psfFluxMeanErr"] = mean
        if len(points) > 1:
            middle = sum(fluxes) / len(fluxes)
            out[f"{band}_psfFluxSigma"] = math.sqrt(
                sum((f - middle) ** 2 for f in fluxes) / (len(fluxes) - 1)
            )
        if slopes:
            out[f"{band}_psfFluxMaxSlope"] = max(slopes, key=abs)
    for name, rows, column in (
        ("fpFlux", forced, "psfFlux"),
        ("scienceFlux", forced or sources, "scienceFlux"),
    ):
        mean = _mean(_pairs(rows, column))
        if mean is not None:
            out[f"{band}_{name}Mean"], out[f"{band}_{name}MeanErr"] = mean
    return out
