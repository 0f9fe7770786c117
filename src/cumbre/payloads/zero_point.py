"""Photometric zero point from stars with reference magnitudes, with the colour term of the instrument.

A camera's band is not quite the catalogue's: ``m_instrument = m_catalogue + c · (colour − pivot)``. With the term the
zero point is that of the camera's own band, normalised at one colour, and does not depend on what stars a field
happens to have. ``c`` comes from the instrument's description, or from the image's own stars, or from both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import ConfigurationError
from cumbre.core.instrument import ColourTerm, Instrument
from cumbre.payloads.refcat import RefCat

Floats = NDArray[np.float64]
MODES = ("description", "fit", "off")
ORDER = ("u", "g", "r", "i", "z", "y")
"""Bands from blue to red: where a description names no colour, that with the neighbour is taken."""
MIN_FIT_STARS, MIN_COLOUR_SPREAD = 12, 0.08
"""Least number of stars, and least standard deviation of their colours (mag), from which a term is fitted alone."""
FLOOR_MAG = 0.02
"""What is added to a star's photon noise: flat field, PSF model, reference magnitudes."""


@dataclass(frozen=True, slots=True)
class ZeroPoint:
    """A zero point and how it came about; NaN where nothing was measured.

    Attributes
    ----------
    value, error
        AB magnitude of one electron, for a source of the pivot's colour.
    scatter
        Robust standard deviation of the stars, mag.
    n
        Stars used.
    colour_term, colour_term_err
        ``c``, magnitudes per magnitude of colour; NaN when none was applied.
    mean_colour
        Of the stars used.
    is_fitted
        Whether the image's stars had a say in the term.
    """

    value: float = float("nan")
    error: float = float("nan")
    scatter: float = float("nan")
    n: int = 0
    colour_term: float = float("nan")
    colour_term_err: float = float("nan")
    mean_colour: float = float("nan")
    is_fitted: bool = False

    def metrics(self) -> dict[str, float]:
        """Under the names of an exposure's metrics; those of the colour only when there is one."""
        out = {
            "n_zero_point": float(self.n), "zero_point": self.value, "zero_point_err": self.error,
            "zero_point_rms": self.scatter,
        }  # fmt: skip
        if np.isfinite(self.colour_term):
            out |= {
                "colour_term": self.colour_term, "colour_term_err": self.colour_term_err,
                "colour_term_fitted": float(self.is_fitted), "zero_point_colour": self.mean_colour,
            }  # fmt: skip
        return out


def colour_of(
    reference: RefCat, instrument: Instrument, physical_filter: str, band: str, mode: str
) -> tuple[ColourTerm, Floats] | None:
    """The term that holds for an image, and every reference star's colour; None for none.

    Raises
    ------
    ConfigurationError
        ``mode`` is none of ``MODES``.
    """
    if mode not in MODES:
        raise ConfigurationError(f"colour_term = {mode!r}: expected one of {', '.join(MODES)}")
    if mode == "off":
        return None
    found = next((f for f in instrument.filters if f.name == physical_filter), None)
    if found is None:
        found = next((f for f in instrument.filters if f.band == band), None)
    term = found.colour if found is not None else None
    if term is None:
        pair = _neighbours(band, reference) if mode == "fit" else None
        if pair is None:
            return None
        term = ColourTerm(bands=pair)
    blue, red = (reference.magnitudes.get(name) for name in term.bands)
    if blue is None or red is None:
        return None
    return term, blue - red


def _neighbours(band: str, reference: RefCat) -> tuple[str, str] | None:
    """The band with the next redder one of the catalogue, else with the next bluer one."""
    if band not in ORDER or band not in reference.magnitudes:
        return None
    there = [name for name in ORDER if name in reference.magnitudes]
    at = there.index(band)
    if at + 1 < len(there):
        return band, there[at + 1]
    return (there[at - 1], band) if at > 0 else None


def measure_zero_point(
    flux: Floats,
    error: Floats,
    mag: Floats,
    *,
    colour: Floats | None = None,
    term: ColourTerm | None = None,
    fit: bool = False,
) -> ZeroPoint:
    """Zero point of stars; robust against variables and wrong matches.

    Parameters
    ----------
    flux, error
        Electrons, shape (n,); stars below S/N 10 take no part.
    mag, colour
        Reference magnitudes and colours, NaN where not known.
    term
        Its ``term`` is applied with its ``error``. None there: the stars are asked.
    fit
        Ask the stars too where the description has a term; that counts as one measurement more.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        good = np.isfinite(mag) & (flux > 0) & (flux > 10 * error)
        if term is not None and colour is not None:
            known = good & (colour >= term.range[0]) & (colour <= term.range[1])
            made = _with_colour(flux, error, mag, colour, known, term, fit=fit)
            if made is not None:
                return made
    return _plain(flux, error, mag, good)


def _with_colour(
    flux: Floats, error: Floats, mag: Floats, colour: Floats, good: NDArray[np.bool_], term: ColourTerm, *, fit: bool
) -> ZeroPoint | None:  # fmt: skip
    count = int(good.sum())
    if count < 3:
        return None
    if term.term is not None and not fit:
        shift = term.term * (colour - term.pivot)
        made = _plain(flux, error, mag + shift, good)
        mean = float(np.mean(colour[good]))
        total = float(np.hypot(made.error, term.error * abs(mean - term.pivot)))
        return ZeroPoint(made.value, total, made.scatter, made.n, term.term, term.error, mean, False)
    if term.term is None and (count < MIN_FIT_STARS or np.std(colour[good]) < MIN_COLOUR_SPREAD):
        return None
    return _line(
        mag[good] + 2.5 * np.log10(flux[good]),
        1.0857 * error[good] / flux[good],
        colour[good] - term.pivot,
        term,
    )


def _line(value: Floats, noise: Floats, colour: Floats, term: ColourTerm) -> ZeroPoint:
    """Zero point and term together: Huber weights to begin, then 3 sigma clipping; errors by the scatter there is."""
    design = np.stack([np.ones_like(colour), -colour], axis=1)
    weight = 1 / (noise**2 + FLOOR_MAG**2)
    prior = np.zeros((2, 2)), np.zeros(2)
    if term.term is not None:
        precision = 1 / max(term.error, 1e-4) ** 2
        prior = np.diag([0.0, precision]), np.array([0.0, precision * term.term])

    def solve(weights: Floats) -> tuple[Floats, Floats, Floats]:
        normal = design.T @ (weights[:, None] * design) + prior[0]
        found = np.linalg.solve(normal, design.T @ (weights * value) + prior[1])
        return found, normal, value - design @ found

    solution, normal, left = solve(weight)
    for _ in range(10):
        sigma = max(1.4826 * float(np.median(np.abs(left - np.median(left)))), 1e-3)
        solution, normal, left = solve(weight * np.minimum(1, 1.5 * sigma / np.maximum(np.abs(left), 1e-9)))
    used = np.ones(value.size, bool)
    for _ in range(8):
        sigma = 1.4826 * float(np.median(np.abs(left[used])))
        keep = np.abs(left) < max(3 * sigma, 0.005)
        if keep.sum() < MIN_FIT_STARS // 2 or np.array_equal(keep, used):
            break
        used = keep
        solution, normal, left = solve(weight * used)
    # The stars' weights count by the scatter they show; the described term keeps its own error.
    freedom = max(int(used.sum()) - 2, 1)
    excess = max(float(np.sum((weight * left**2)[used])) / freedom, 1e-6)
    covariance = np.linalg.inv((normal - prior[0]) / excess + prior[0])
    return ZeroPoint(
        float(solution[0]), float(np.sqrt(covariance[0, 0])), sigma, int(used.sum()), float(solution[1]),
        float(np.sqrt(covariance[1, 1])), float(np.mean(colour[used])) + term.pivot, True,
    )  # fmt: skip


def _plain(flux: Floats, error: Floats, mag: Floats, good: NDArray[np.bool_]) -> ZeroPoint:
    """Clipped mean of reference − instrumental magnitude."""
    if good.sum() < 3:
        return ZeroPoint(n=int(good.sum()))
    value = mag[good] + 2.5 * np.log10(flux[good])
    # equal weights beyond 2 %: reference catalogues have colour terms
    weight = 1 / ((1.0857 * error[good] / flux[good]) ** 2 + FLOOR_MAG**2)
    used = np.ones(value.size, bool)
    centre, sigma = float(np.median(value)), 0.0
    for _ in range(5):
        centre = float(np.median(value[used]))
        sigma = 1.4826 * float(np.median(np.abs(value[used] - centre)))
        keep = np.abs(value - centre) < max(3 * sigma, 0.005)
        if keep.sum() < 3 or np.array_equal(keep, used):
            break
        used = keep
    mean = float(np.sum(weight[used] * value[used]) / np.sum(weight[used]))
    return ZeroPoint(mean, max(sigma, 1e-4) / float(np.sqrt(used.sum())), sigma, int(used.sum()))
