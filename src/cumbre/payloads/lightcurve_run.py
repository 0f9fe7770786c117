"""``cumbre lightcurve``: raw frames of one field to the light curves of its stars and the transit of one of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import CumbreError, NotFoundError, NoWorkFoundError, UnprocessableDataError
from cumbre.core.geometry import approximate_wcs, separation_deg
from cumbre.core.instrument import Instrument
from cumbre.core.time import isot, mjd_from_seconds, seconds_from_mjd, utc_from_tai
from cumbre.payloads.exposure import Exposure
from cumbre.payloads.isr import assemble_and_correct
from cumbre.payloads.kernels.wcs import PlaneWcs
from cumbre.payloads.light_curve import Dip, LightCurves, ensemble_light_curves, fit_dip
from cumbre.payloads.raw import read_raw
from cumbre.payloads.transit import SOLAR_TYPE, Transit, fit_transit

Floats = NDArray[np.float64]
CREDIBLE = 60.0
"""Least gain in χ² of a dip that is called one."""
SEEN = 0.8
"""Part of the frames in which a star must be to be looked at for dips."""


@dataclass(frozen=True, slots=True)
class Series:
    """Light curves and what is known of frames and stars.

    Attributes
    ----------
    curves
        The measurements, m frames.
    frames
        Metadata of the m frames.
    ra, dec
        (n,) ICRS degrees by the pointing of the first frame's header, good to ``position_error_deg``.
    band
        Of all frames.
    njy_per_electron
        From the filter's nominal zero point and the exposure time, without extinction: some 20 % at best.
    """

    curves: LightCurves
    frames: list[dict[str, Any]]
    ra: Floats
    dec: Floats
    position_error_deg: float
    band: str
    njy_per_electron: float


def measure(
    paths: Sequence[Path], instrument: Instrument, *, aperture_px: float | None = None
) -> tuple[Series, list[dict[str, str]]]:
    """Light curves of the stars of raw frames, and the files that were refused.

    Raises
    ------
    NoWorkFoundError
        Fewer than 3 usable frames.
    UnprocessableDataError
        The frames are of several filters or detectors, have no pointing, or do not show the same field.
    """
    frames: list[Exposure] = []
    refused: list[dict[str, str]] = []
    for path in paths:
        try:
            frames.append(assemble_and_correct(read_raw(path, instrument)))
        except CumbreError as error:
            refused.append({"file": Path(path).name, "outcome": error.outcome, "message": str(error)})
    kinds = sorted({(str(f.metadata["physical_filter"]), int(f.metadata["detector"])) for f in frames})
    if len(kinds) > 1:
        raise UnprocessableDataError(
            f"light curves: frames of several filters or detectors: {kinds}; give one kind"
        )
    if len(frames) < 3:
        why = f"; the first refusal: {refused[0]['message']}" if refused else ""
        raise NoWorkFoundError(f"light curves: {len(frames)} usable frames; at least 3 are needed{why}")
    frames.sort(key=lambda frame: float(frame.metadata["mjd_mid_tai"]))
    curves = ensemble_light_curves(frames, aperture_px=aperture_px)
    placed = np.searchsorted([float(f.metadata["mjd_mid_tai"]) for f in frames], curves.mjd_tai - 1e-9)
    about = [frames[int(k)].metadata for k in placed]
    ra, dec = _positions(curves, about[0], instrument)
    name = str(about[0]["physical_filter"])
    nominal = next((f.zero_point for f in instrument.filters if f.name == name), 25.0)
    exposure_s = max(float(about[0]["exposure_s"]), 1e-3)
    scale = 3631e9 * 10 ** (-0.4 * nominal) / exposure_s
    series = Series(
        curves, about, ra, dec, instrument.pointing_error_deg, str(about[0]["band"] or name), scale
    )
    return series, refused


def _positions(curves: LightCurves, first: dict[str, Any], instrument: Instrument) -> tuple[Floats, Floats]:
    """Sky positions by the header of the first frame: later ones have drifted, and their headers do not say so."""
    ra_deg, dec_deg = (
        math.nan if first.get(key) is None else float(first[key]) for key in ("ra_deg", "dec_deg")
    )
    if not math.isfinite(ra_deg + dec_deg):
        raise UnprocessableDataError(f"{first.get('raw_path')}: no pointing (ra, dec) in the header")
    turn = float(first.get("rotpa_deg") or 0.0)
    turn = turn if math.isfinite(turn) else 0.0
    header = approximate_wcs(instrument, instrument.detector(int(first["detector"])), ra_deg, dec_deg, turn)
    x, y = curves.transforms[0].inverse()(curves.x, curves.y)
    ra, dec = PlaneWcs.from_header(header).pix2sky(x, y)
    return np.asarray(ra, np.float64), np.asarray(dec, np.float64)


@dataclass(frozen=True, slots=True)
class Choice:
    """The star that was looked for: its index, its dip, and the runner-up's gain in χ²."""

    star: int
    dip: Dip
    next_best: float
    candidates: int


def choose(series: Series, target: tuple[float, float] | None) -> Choice:
    """The star with the most significant dip, among those that may be the target.

    Positions are good to the pointing of the mount only, so a target is a circle on the sky, and the dip says which
    star in it.

    Parameters
    ----------
    target
        ICRS degrees; None looks at all stars.

    Raises
    ------
    NotFoundError
        No star near the target is in enough frames.
    """
    curves = series.curves
    seen = np.isfinite(curves.relative).sum(axis=1) >= max(8, SEEN * curves.mjd_tai.size)
    if target is not None:
        seen &= separation_deg(series.ra, series.dec, *target) <= series.position_error_deg
    stars = np.flatnonzero(seen)
    if stars.size == 0:
        where = f" within {series.position_error_deg} deg of {target}" if target else ""
        raise NotFoundError(
            f"light curves: no star{where} is in {SEEN:.0%} of the {curves.mjd_tai.size} frames"
        )
    dips = [fit_dip(curves.mjd_tai, curves.relative[k]) for k in stars]
    gains = np.array([dip.delta_chi2 for dip in dips])
    order = np.argsort(-gains)
    runner_up = float(gains[order[1]]) if gains.size > 1 else 0.0
    best = int(order[0])
    return Choice(int(stars[best]), dips[best], runner_up, int(stars.size))


def run(
    paths: Sequence[Path],
    out: Path,
    *,
    instrument: Instrument,
    target: tuple[float, float] | None = None,
    aperture_px: float | None = None,
) -> tuple[dict[str, Any], Series]:
    """Measure, choose, fit, and write ``lightcurves.parquet``, ``.csv``, ``lightcurve.png``, ``report.json``.

    Parameters
    ----------
    paths
        Raw frames, in any order.
    target
        ICRS degrees of the star to fit; the most significant dip of the field by default.
    aperture_px
        Radius; 1.6 FWHM by default.

    Returns
    -------
    report, series
        What is in ``report.json``, and the measurements.

    Raises
    ------
    CumbreError
        See :func:`measure` and :func:`choose`.
    """
    from cumbre.stores.files import write_atomic

    series, refused = measure(paths, instrument, aperture_px=aperture_px)
    choice = choose(series, target)
    curves = series.curves
    transit = fit_transit(curves.mjd_tai, curves.relative[choice.star])
    first_x, first_y = (
        float(v) for v in curves.transforms[0].inverse()(curves.x[choice.star], curves.y[choice.star])
    )
    ra, dec = float(series.ra[choice.star]), float(series.dec[choice.star])
    report: dict[str, Any] = {
        "instrument": instrument.name,
        "frames": int(curves.mjd_tai.size),
        "refused": refused,
        "stars": int(curves.x.size),
        "measurements": int(np.isfinite(curves.relative).sum()),
        "band": series.band,
        "position_error_deg": series.position_error_deg,
        "drift_px": _drift(curves),
        "target": {
            "object": choice.star,
            "ra": round(ra, 5),
            "dec": round(dec, 5),
            "asked": list(target) if target else None,
            "offset_deg": round(float(separation_deg(ra, dec, *target)), 4) if target else None,
            "first_frame_xy": [round(first_x, 2), round(first_y, 2)],
            "candidates": choice.candidates,
            "delta_chi2": round(choice.dip.delta_chi2, 1),
            "next_best_delta_chi2": round(choice.next_best, 1),
            "is_credible": bool(choice.dip.delta_chi2 > CREDIBLE),
        },
        "transit": _numbers(choice.dip, transit),
    }
    _tables(series, out)
    _picture(series, choice, transit, report, out / "lightcurve.png")
    write_atomic(out / "report.json", json.dumps(report, indent=2, allow_nan=False).encode())
    return report, series


def _drift(curves: LightCurves) -> list[float]:
    """How far the field moves from the first to the last frame, pixels in x and y."""
    first = curves.transforms[0].inverse()(curves.x[:1], curves.y[:1])
    last = curves.transforms[-1].inverse()(curves.x[:1], curves.y[:1])
    return [round(float(b[0] - a[0]), 1) for a, b in zip(first, last, strict=True)]


def _utc(mjd_tai: float) -> float:
    """UTC unix time of an MJD TAI."""
    return utc_from_tai(seconds_from_mjd(mjd_tai))


def _finite(value: float, digits: int) -> float | None:
    return round(float(value), digits) if math.isfinite(value) else None


def _numbers(dip: Dip, transit: Transit) -> dict[str, Any]:
    return {
        "mid_utc": isot(_utc(transit.mid), 0),
        "mid_mjd_utc": round(mjd_from_seconds(_utc(transit.mid)), 6),
        "mid_err_min": _finite(transit.mid_err * 1440, 2),
        "depth": round(transit.area_ratio, 5),
        "depth_err": _finite(transit.area_ratio_err, 5),
        "limb_darkening": list(SOLAR_TYPE),
        "bottom": round(dip.depth, 5),
        "bottom_err": _finite(dip.depth_err, 5),
        "duration_h": round(transit.duration * 24, 3),
        "scatter": round(transit.scatter, 5),
        "n_used": transit.n_used,
    }


def _tables(series: Series, out: Path) -> None:
    """All measurements of all stars, with their sky positions."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    from cumbre.stores.files import write_atomic

    rows = series.curves.table()
    columns = {name: np.ascontiguousarray(rows[name]) for name in rows.dtype.names or ()}
    columns["ra"], columns["dec"] = series.ra[rows["object"]], series.dec[rows["object"]]
    names = np.array([str(frame["obs_id"]) for frame in series.frames])
    columns["obs_id"] = names[rows["frame"]]
    table = pa.table(columns)
    for name, writer in (
        ("lightcurves.parquet", pyarrow.parquet.write_table),
        ("lightcurves.csv", pyarrow.csv.write_csv),
    ):
        sink = pa.BufferOutputStream()
        writer(table, sink)
        write_atomic(out / name, sink.getvalue().to_pybytes())


def _comparison(series: Series, star: int) -> int | None:
    """A star about as bright as another, in most of the frames, the steadiest of the ten nearest in brightness."""
    curves = series.curves
    seen = np.isfinite(curves.relative).sum(axis=1) >= SEEN * curves.mjd_tai.size
    seen[star] = False
    index = np.flatnonzero(seen)
    if index.size == 0:
        return None
    level = np.log(np.nanmedian(curves.flux[index], axis=1) / np.nanmedian(curves.flux[star]))
    near = index[np.argsort(np.abs(level))[:10]]
    return int(near[np.argmin(np.nanstd(curves.relative[near], axis=1))])


def _picture(series: Series, choice: Choice, transit: Transit, report: dict[str, Any], path: Path) -> None:
    """The star with the fit, a comparison star below it, the residuals."""
    from cumbre.payloads.pictures import DOUBT, GOOD, INK, SOFT, new_figure, save_png, style

    curves = series.curves
    utc = np.array([_utc(float(value)) for value in curves.mjd_tai])
    midnight = math.floor(utc[0] / 86400) * 86400.0
    hours = (utc - midnight) / 3600
    flux = curves.relative[choice.star]
    numbers = report["transit"]
    figure = new_figure(8.4, 5.2)
    top, low = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    title = (
        f"{series.frames[0].get('object') or 'target'}: mid {numbers['mid_utc'][11:19]} UTC ± {numbers['mid_err_min']:.1f} min, "
        f"area hidden {100 * numbers['depth']:.2f} ± {100 * (numbers['depth_err'] or 0):.2f} %"
    )
    style(top, title, grid=True)
    top.errorbar(
        hours,
        flux,
        np.full(flux.size, transit.scatter),
        fmt="o",
        ms=4,
        color=GOOD,
        elinewidth=0.8,
        label="target",
    )
    top.plot(hours, transit.model, color=DOUBT, linewidth=1.6, label="limb-darkened transit")
    other = _comparison(series, choice.star)
    if other is not None:
        shift = 1.6 * numbers["bottom"] + 4 * transit.scatter
        top.plot(
            hours,
            curves.relative[other] - shift,
            ".",
            color=SOFT,
            label=f"comparison star, shifted by {-shift:.3f}",
        )
    low_end, high_end = top.get_ylim()
    top.set_ylim(low_end, high_end + 0.22 * (high_end - low_end))  # room for the legend
    top.set_ylabel("relative light")
    top.legend(loc="upper right", fontsize=7, facecolor="#1b222c", labelcolor=INK, edgecolor="#33404f")
    style(low, "", grid=True)
    low.plot(hours, 100 * (flux - transit.model), "o", ms=3, color=GOOD)
    low.axhline(0, color=DOUBT, linewidth=1)
    low.set_ylabel("residual [%]")
    low.set_xlabel(f"hours UTC of {isot(midnight)[:10]}")
    save_png(figure, path)
