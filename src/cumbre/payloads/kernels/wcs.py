"""World coordinates of one detector: tangent plane with a polynomial distortion (TAN-SIP).

:class:`PlaneWcs` evaluates in plain numpy, at about 0.1 µs per position and term, which is what the pixel
loops need; its header is a normal TAN-SIP header that any other software reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cumbre.core.errors import UnprocessableDataError

Floats = NDArray[np.float64]


def to_tangent_plane(ra: ArrayLike, dec: ArrayLike, ra0: float, dec0: float) -> tuple[Floats, Floats]:
    """Project (ra, dec) on the plane that touches the sky at (ra0, dec0); all in degrees.

    Returns
    -------
    xi, eta
        Degrees, xi to the east, eta to the north; NaN for positions 90 degrees or more away.
    """
    a = np.radians(np.asarray(ra, dtype=np.float64) - ra0)
    d = np.radians(np.asarray(dec, dtype=np.float64))
    d0 = np.radians(dec0)
    cos_d, sin_d, cos_a = np.cos(d), np.sin(d), np.cos(a)
    depth = np.sin(d0) * sin_d + np.cos(d0) * cos_d * cos_a
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = np.where(depth > 1e-9, depth, np.nan)
        xi = cos_d * np.sin(a) / depth
        eta = (np.cos(d0) * sin_d - np.sin(d0) * cos_d * cos_a) / depth
    return np.degrees(xi), np.degrees(eta)


def from_tangent_plane(xi: ArrayLike, eta: ArrayLike, ra0: float, dec0: float) -> tuple[Floats, Floats]:
    """Undo :func:`to_tangent_plane`; ra in [0, 360)."""
    x = np.radians(np.asarray(xi, dtype=np.float64))
    y = np.radians(np.asarray(eta, dtype=np.float64))
    d0 = np.radians(dec0)
    depth = np.cos(d0) - y * np.sin(d0)
    ra = (ra0 + np.degrees(np.arctan2(x, depth))) % 360.0
    dec = np.degrees(np.arctan2(np.sin(d0) + y * np.cos(d0), np.hypot(x, depth)))
    return ra, dec


def _powers(order: int, start: int) -> list[tuple[int, int]]:
    return [(n - q, q) for n in range(start, order + 1) for q in range(n + 1)]


@dataclass(frozen=True, slots=True)
class PlaneWcs:
    """TAN-SIP world coordinates.

    Attributes
    ----------
    crval
        (ra, dec) of the reference pixel, ICRS degrees.
    crpix
        (x, y) of the reference pixel, 0-based.
    cd
        Degrees per pixel, shape (2, 2).
    a, b
        SIP coefficients ``a[p, q]`` of u^p v^q (pixels), shape (order + 1, order + 1); the entries with
        p + q < 2 are zero. Shape (1, 1) when there is no distortion.
    """

    crval: tuple[float, float]
    crpix: tuple[float, float]
    cd: Floats
    a: Floats
    b: Floats

    @property
    def order(self) -> int:
        """Degree of the distortion; 1 for a linear one."""
        return max(1, int(self.a.shape[0]) - 1)

    @property
    def pixel_scale_arcsec(self) -> float:
        """Arc seconds per pixel (square root of the pixel's area)."""
        return float(np.sqrt(abs(np.linalg.det(self.cd))) * 3600)

    def _distortion(self, u: Floats, v: Floats) -> tuple[Floats, Floats]:
        du, dv = np.zeros_like(u), np.zeros_like(v)
        for p, q in _powers(self.a.shape[0] - 1, 2):
            if self.a[p, q] != 0 or self.b[p, q] != 0:
                term = u**p * v**q
                du += self.a[p, q] * term
                dv += self.b[p, q] * term
        return du, dv

    def pix2sky(self, x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
        """(ra, dec) in ICRS degrees of 0-based pixel positions; shapes broadcast."""
        u = np.asarray(x, dtype=np.float64) - self.crpix[0]
        v = np.asarray(y, dtype=np.float64) - self.crpix[1]
        u, v = np.broadcast_arrays(u, v)
        du, dv = self._distortion(u, v)
        up, vp = u + du, v + dv
        xi = self.cd[0, 0] * up + self.cd[0, 1] * vp
        eta = self.cd[1, 0] * up + self.cd[1, 1] * vp
        return from_tangent_plane(xi, eta, *self.crval)

    def sky2pix(self, ra: ArrayLike, dec: ArrayLike) -> tuple[Floats, Floats]:
        """0-based pixel positions of ICRS degrees; NaN for the far half of the sky.

        The distortion is undone by fixed-point steps, good to 1e-6 pixel near the detector. Where they do not
        converge (far outside the fitted region) the undistorted position is returned.
        """
        xi, eta = to_tangent_plane(ra, dec, *self.crval)
        inverse = np.linalg.inv(self.cd)
        up = inverse[0, 0] * xi + inverse[0, 1] * eta
        vp = inverse[1, 0] * xi + inverse[1, 1] * eta
        u, v = up.copy(), vp.copy()
        if self.a.shape[0] > 2:
            with np.errstate(over="ignore", invalid="ignore"):
                for _ in range(20):
                    du, dv = self._distortion(u, v)
                    step = np.abs(up - du - u) + np.abs(vp - dv - v)
                    u, v = up - du, vp - dv
                    if not np.any(step > 1e-7):
                        break
            wild = ~(step < 1e-2)
            u, v = np.where(wild, up, u), np.where(wild, vp, v)
        return u + self.crpix[0], v + self.crpix[1]

    def to_header(self, shape: tuple[int, int] | None = None) -> dict[str, Any]:
        """FITS keywords (1-based CRPIX). With ``shape`` (ny, nx) the inverse terms AP, BP are fitted too."""
        header: dict[str, Any] = {
            "WCSAXES": 2,
            "CTYPE1": "RA---TAN",
            "CTYPE2": "DEC--TAN",
            "CUNIT1": "deg",
            "CUNIT2": "deg",
            "CRVAL1": float(self.crval[0]),
            "CRVAL2": float(self.crval[1]),
            "CRPIX1": float(self.crpix[0] + 1),
            "CRPIX2": float(self.crpix[1] + 1),
            "CD1_1": float(self.cd[0, 0]),
            "CD1_2": float(self.cd[0, 1]),
            "CD2_1": float(self.cd[1, 0]),
            "CD2_2": float(self.cd[1, 1]),
            "RADESYS": "ICRS",
        }
        order = self.a.shape[0] - 1
        if order < 2:
            return header
        header["CTYPE1"], header["CTYPE2"] = "RA---TAN-SIP", "DEC--TAN-SIP"
        header["A_ORDER"] = header["B_ORDER"] = order
        for p, q in _powers(order, 2):
            header[f"A_{p}_{q}"] = float(self.a[p, q])
            header[f"B_{p}_{q}"] = float(self.b[p, q])
        if shape is not None:
            self._add_inverse(header, shape, order + 1)
        return header

    def _add_inverse(self, header: dict[str, Any], shape: tuple[int, int], order: int) -> None:
        ny, nx = shape
        x, y = np.meshgrid(np.linspace(0, nx - 1, 21), np.linspace(0, ny - 1, 21))
        u, v = (x - self.crpix[0]).ravel(), (y - self.crpix[1]).ravel()
        du, dv = self._distortion(u, v)
        up, vp = u + du, v + dv
        size = max(float(np.abs(up).max()), float(np.abs(vp).max()), 1.0)
        powers = _powers(order, 0)
        basis = np.stack([(up / size) ** p * (vp / size) ** q for p, q in powers], axis=1)
        coefficients, *_ = np.linalg.lstsq(basis, np.stack([-du, -dv], axis=1), rcond=None)
        header["AP_ORDER"] = header["BP_ORDER"] = order
        for (p, q), (ap, bp) in zip(powers, coefficients, strict=True):
            header[f"AP_{p}_{q}"] = float(ap / size ** (p + q))
            header[f"BP_{p}_{q}"] = float(bp / size ** (p + q))

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> PlaneWcs:
        """Read a TAN or TAN-SIP header (CD, or PC with CDELT, or CDELT with CROTA2).

        Raises
        ------
        UnprocessableDataError
            Another projection, or keywords missing or not finite.
        """
        ctype = str(header.get("CTYPE1", ""))
        if ctype not in ("RA---TAN", "RA---TAN-SIP"):
            raise UnprocessableDataError(
                f"WCS header: CTYPE1 = {ctype!r}; expected RA---TAN or RA---TAN-SIP with right ascension first"
            )
        try:
            crval = (float(header["CRVAL1"]), float(header["CRVAL2"]))
            crpix = (float(header["CRPIX1"]) - 1, float(header["CRPIX2"]) - 1)
            cd = _cd_matrix(header)
            order = max(int(header.get("A_ORDER", 0)), int(header.get("B_ORDER", 0)))
            order = order if 2 <= order <= 9 else 0
            a, b = np.zeros((order + 1, order + 1)), np.zeros((order + 1, order + 1))
            for p, q in _powers(order, 2):
                a[p, q] = float(header.get(f"A_{p}_{q}", 0.0))
                b[p, q] = float(header.get(f"B_{p}_{q}", 0.0))
        except (KeyError, TypeError, ValueError) as error:
            raise UnprocessableDataError(f"WCS header: missing or unreadable keyword: {error}") from error
        finite = np.isfinite(cd).all() and np.isfinite([*crval, *crpix]).all()
        if not finite or abs(np.linalg.det(cd)) < 1e-30:
            raise UnprocessableDataError(
                f"WCS header: CD matrix {cd.tolist()} with CRVAL {crval} is not usable"
            )
        return cls(crval, crpix, cd, a, b)

    @classmethod
    def linear(cls, ra: float, dec: float, x: float, y: float, cd: ArrayLike) -> PlaneWcs:
        """A plain TAN WCS with the 0-based reference pixel (x, y)."""
        return cls((ra, dec), (x, y), np.asarray(cd, dtype=np.float64), np.zeros((1, 1)), np.zeros((1, 1)))


def _cd_matrix(header: Mapping[str, Any]) -> Floats:
    if "CD1_1" in header:
        return np.array([[float(header.get(f"CD{i}_{j}", 0.0)) for j in (1, 2)] for i in (1, 2)])
    cdelt = np.array([float(header["CDELT1"]), float(header["CDELT2"])])
    if "PC1_1" in header or "PC2_2" in header:
        pc = [[float(header.get(f"PC{i}_{j}", float(i == j))) for j in (1, 2)] for i in (1, 2)]
        return np.asarray(cdelt[:, None] * np.array(pc))
    t = np.radians(float(header.get("CROTA2", 0.0)))
    rotation = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
    return np.asarray(rotation * cdelt[None, :])


@dataclass(frozen=True, slots=True)
class WcsFit:
    """A fitted WCS and how well it fits.

    Attributes
    ----------
    wcs
        The result.
    used
        bool of shape (n,): pairs that survived the clipping.
    rms_x_arcsec, rms_y_arcsec
        Residual rms of the used pairs to the east and to the north.
    """

    wcs: PlaneWcs
    used: NDArray[np.bool_]
    rms_x_arcsec: float
    rms_y_arcsec: float


def fit_wcs(
    x: ArrayLike,
    y: ArrayLike,
    ra: ArrayLike,
    dec: ArrayLike,
    *,
    crpix: tuple[float, float],
    order: int = 3,
    weight: ArrayLike | None = None,
    clip: float = 4.0,
    rounds: int = 5,
) -> WcsFit:
    """Fit TAN with a polynomial distortion to matched positions, clipping outliers.

    Parameters
    ----------
    x, y, ra, dec
        Matched positions, shape (n,): 0-based pixels and ICRS degrees.
    crpix
        Reference pixel (x, y), 0-based: use the detector's centre.
    order
        Highest degree; lowered until there are at least three stars per coefficient, unless a higher one tells each
        star's place from the others at least twice as well.
    weight
        Relative weights (inverse variances), shape (n,).
    clip
        Pairs further than ``clip`` robust sigma are left out.

    Raises
    ------
    UnprocessableDataError
        Fewer than three pairs, or they lie on a line.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    ras, decs = np.asarray(ra, np.float64), np.asarray(dec, np.float64)
    if xs.size < 3:
        raise UnprocessableDataError(f"WCS fit: {xs.size} matched stars; at least 3 are needed")
    root = np.sqrt(np.ones(xs.size) if weight is None else np.asarray(weight, np.float64))
    degree = max(1, order)
    while degree > 1 and xs.size < 3 * _terms(degree):
        degree -= 1
    best, least = _fit_degree(xs, ys, ras, decs, root, crpix, degree, clip, rounds)
    # With few stars a higher degree must predict each star far better from the others.
    while degree < order and xs.size >= 1.5 * _terms(degree + 1):
        degree += 1
        fit, error = _fit_degree(xs, ys, ras, decs, root, crpix, degree, clip, rounds)
        if error < 0.5 * least:
            best, least = fit, error
    return best


def _terms(degree: int) -> int:
    return (degree + 1) * (degree + 2) // 2


def _fit_degree(
    xs: Floats,
    ys: Floats,
    ras: Floats,
    decs: Floats,
    root: Floats,
    crpix: tuple[float, float],
    order: int,
    clip: float,
    rounds: int,
) -> tuple[WcsFit, float]:
    """The fit of one degree, and by how much (median, arc seconds) it misses a star that it does not know."""
    u, v = xs - crpix[0], ys - crpix[1]
    size = max(float(np.abs(u).max()), float(np.abs(v).max()), 1.0)
    used = np.ones(xs.size, dtype=bool)
    crval = _sky_mean(ras, decs)
    coefficients = np.zeros((3, 2))
    powers = _powers(1, 0)
    residual = np.zeros((xs.size, 2))
    basis = np.zeros((xs.size, 3))
    for _ in range(max(rounds, 3)):
        degree = order
        while degree > 1 and used.sum() < 1.5 * _terms(degree):
            degree -= 1
        powers = _powers(degree, 0)
        basis = np.stack([(u / size) ** p * (v / size) ** q for p, q in powers], axis=1)
        for _ in range(3):  # move CRVAL until the polynomial has no constant: SIP has none
            plane = np.stack(to_tangent_plane(ras, decs, *crval), axis=1)
            rows = basis[used] * root[used, None]
            coefficients, _, rank, _ = np.linalg.lstsq(rows, plane[used] * root[used, None], rcond=1e-12)
            if rank < len(powers):
                raise UnprocessableDataError(
                    f"WCS fit: {int(used.sum())} stars do not determine a polynomial of degree {degree}"
                )
            residual = (plane - basis @ coefficients) * 3600
            offset = coefficients[0]
            new_ra, new_dec = from_tangent_plane(offset[0], offset[1], *crval)
            crval = (float(new_ra), float(new_dec))
            if np.abs(offset).max() < 1e-10:
                break
        distance = np.hypot(residual[:, 0], residual[:, 1])
        # the median of a Rayleigh distribution is 1.1774 sigma
        sigma = max(float(np.median(distance[used])) / 1.1774, 1e-7)
        keep = distance < clip * sigma
        if keep.sum() < 3 or np.array_equal(keep, used):
            break
        used = keep
    cd = np.array([[coefficients[1, i] / size, coefficients[2, i] / size] for i in (0, 1)])
    degree = max(p + q for p, q in powers)
    shape = (degree + 1, degree + 1) if degree > 1 else (1, 1)
    a, b = np.zeros(shape), np.zeros(shape)
    inverse = np.linalg.inv(cd)
    for (p, q), (cx, cy) in zip(powers[3:], coefficients[3:], strict=True):
        a[p, q], b[p, q] = inverse @ np.array([cx, cy]) / size ** (p + q)
    free = max(int(used.sum()) - len(powers), 1)
    rms = np.sqrt(np.sum(residual[used] ** 2, axis=0) / free)
    rows = basis[used] * root[used, None]
    own = np.einsum("ij,ji->i", rows, np.linalg.pinv(rows))
    missed = np.hypot(residual[used, 0], residual[used, 1]) / np.maximum(1 - own, 0.02)
    fit = WcsFit(PlaneWcs(crval, crpix, cd, a, b), used, float(rms[0]), float(rms[1]))
    return fit, float(np.median(missed))


def _sky_mean(ra: Floats, dec: Floats) -> tuple[float, float]:
    a, d = np.radians(ra), np.radians(dec)
    x, y, z = np.mean(np.cos(d) * np.cos(a)), np.mean(np.cos(d) * np.sin(a)), np.mean(np.sin(d))
    return float(np.degrees(np.arctan2(y, x)) % 360), float(np.degrees(np.arctan2(z, np.hypot(x, y))))
