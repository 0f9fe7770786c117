"""PSF matching by Alard–Lupton: Gaussians times polynomials, coefficients varying over the field.

The kernel ``K(x, y)`` and differential background ``b(x, y)`` minimise ``Σ (T − R ⊗ K − b)² / variance`` over
stamps of isolated stars, T being the target and R the image to convolve. Normal equations are built once
per stamp; clipping a stamp only leaves its matrix out of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cumbre.core.errors import NoWorkFoundError

Float64 = NDArray[np.float64]
MIN_STAMPS = 3
_RIDGE = 1e-10


@dataclass(frozen=True, slots=True)
class GaussianBasis:
    """Separable kernel functions; the first has sum 1, every other one sum 0.

    Attributes
    ----------
    along_x, along_y
        (n, 2·half + 1): the factors before the sum is removed.
    sums
        (n,): sum of each product, subtracted as ``sums[k]`` times the first function (0 for the first).
    """

    half: int
    along_x: Float64
    along_y: Float64
    sums: Float64

    @property
    def size(self) -> int:
        """Number of functions."""
        return len(self.sums)

    def images(self) -> Float64:
        """(n, 2·half + 1, 2·half + 1) kernel images."""
        raw = np.einsum("ky,kx->kyx", self.along_y, self.along_x)
        raw[1:] -= self.sums[1:, None, None] * raw[0]
        return np.asarray(raw)

    def convolve(self, stamp: Float64) -> Float64:
        """The convolution of one stamp with every function, where it is complete.

        Parameters
        ----------
        stamp
            (m, m) with m > 2·half.

        Returns
        -------
        (n, m − 2·half, m − 2·half).
        """
        across = _toeplitz(self.along_x, stamp.shape[1])
        up = _toeplitz(self.along_y, stamp.shape[0])
        out = np.matmul(np.matmul(up, stamp), across.transpose(0, 2, 1))
        out[1:] -= self.sums[1:, None, None] * out[0]
        return np.asarray(out)


def _toeplitz(factors: Float64, length: int) -> Float64:
    """(n, length − size + 1, length) matrices that convolve a vector with each factor."""
    n, size = factors.shape
    out = np.zeros((n, length - size + 1, length))
    for row in range(length - size + 1):
        out[:, row, row : row + size] = factors[:, ::-1]
    return out


def gaussian_basis(half: int, sigmas: Sequence[float], degrees: Sequence[int]) -> GaussianBasis:
    """Build the basis: for each width all monomials x^p·y^q with p + q up to its degree.

    Parameters
    ----------
    half
        Half size of the kernel, pixels.
    sigmas, degrees
        Gaussian widths (pixels) and polynomial degrees; the first width's constant is the unit-sum function.
    """
    u = np.arange(-half, half + 1) / half
    x = np.arange(-half, half + 1)
    along_x: list[Float64] = []
    along_y: list[Float64] = []
    sums: list[float] = []
    for sigma, degree in zip(sigmas, degrees, strict=True):
        gauss = np.exp(-0.5 * (x / sigma) ** 2)
        for p in range(degree + 1):
            for q in range(degree + 1 - p):
                fx, fy = gauss * u**p, gauss * u**q
                norm = (
                    float(fx.sum() * fy.sum()) if not sums else float(np.sqrt((fx**2).sum() * (fy**2).sum()))
                )
                along_x.append(fx / norm)
                along_y.append(fy)
                sums.append(0.0 if not sums else float(along_x[-1].sum() * fy.sum()))
    return GaussianBasis(half, np.array(along_x), np.array(along_y), np.array(sums))


def _monomials(x: ArrayLike, y: ArrayLike, shape: tuple[int, int], order: int) -> Float64:
    """(n, n_terms) polynomial terms in pixel positions scaled to −1…1."""
    u = 2.0 * np.asarray(x, float) / max(shape[1] - 1, 1) - 1.0
    v = 2.0 * np.asarray(y, float) / max(shape[0] - 1, 1) - 1.0
    return np.stack([u ** (d - q) * v**q for d in range(order + 1) for q in range(d + 1)], axis=-1)


def _n_terms(order: int) -> int:
    return (order + 1) * (order + 2) // 2


@dataclass(slots=True)
class KernelSolution:
    """A fitted kernel field.

    Attributes
    ----------
    coefficients
        (n_basis, n_terms) for the polynomial of degree ``order`` in the position.
    background
        Polynomial coefficients of the differential background (target − convolved).
    used
        (n_stamps,) bool: the stamps that survived clipping.
    metrics
        sum, sum_rms (scatter of the sum over the field), condition, chi2 (median reduced χ² of the stamps used),
        residual (median over stamps of rms residual / peak), n_stamps.
    """

    basis: GaussianBasis
    shape: tuple[int, int]
    order: int
    coefficients: Float64
    background_order: int
    background: Float64
    used: NDArray[np.bool_]
    metrics: dict[str, float] = field(default_factory=dict)
    _images: Float64 | None = None

    def kernel(self, x: float, y: float) -> Float64:
        """The (2·half + 1)² kernel image at a position."""
        if self._images is None:
            self._images = self.basis.images()
        terms = _monomials(np.array([x]), np.array([y]), self.shape, self.order)[0]
        return np.asarray(np.tensordot(self.coefficients @ terms, self._images, axes=1))

    def background_image(self) -> NDArray[np.float32]:
        """(ny, nx) differential background."""
        return self.background_tile(0, self.shape[0], 0, self.shape[1])

    def background_tile(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[np.float32]:
        """Differential background of the rows y0 … y1 − 1 and columns x0 … x1 − 1."""
        ny, nx = self.shape
        v = 2.0 * np.arange(y0, y1) / max(ny - 1, 1) - 1.0
        u = 2.0 * np.arange(x0, x1) / max(nx - 1, 1) - 1.0
        up = np.zeros((self.background_order + 1, x1 - x0))
        index = 0
        for degree in range(self.background_order + 1):
            for q in range(degree + 1):
                up[q] += self.background[index] * u ** (degree - q)
                index += 1
        rows = np.stack([v**q for q in range(self.background_order + 1)], axis=1)
        return np.asarray(rows.astype(np.float32) @ up.astype(np.float32))


@dataclass(slots=True)
class _Stamp:
    matrix: Float64
    vector: Float64
    target_square: float
    n_pixels: int
    peak: float
    mean_variance: float


def fit_kernel(
    reference: NDArray[np.float32],
    target: NDArray[np.float32],
    variance: NDArray[np.float32] | tuple[NDArray[np.float32], ...],
    bad: NDArray[np.bool_] | tuple[NDArray[np.bool_], ...],
    positions: Float64,
    *,
    basis: GaussianBasis,
    order: int = 2,
    sum_order: int = 0,
    background_order: int = 1,
    fit_half: int = 10,
    systematic: float = 0.01,
    clip: float = 3.0,
    n_iterations: int = 4,
    towards_first: float = 0.0,
    reference_variance: NDArray[np.float32] | None = None,
) -> KernelSolution:
    """Fit the matching kernel on stamps of stars.

    Parameters
    ----------
    reference, target
        (ny, nx) background-subtracted images on one pixel grid; ``reference`` is the one to convolve.
    variance
        (ny, nx) variance of target and reference together; or a tuple of planes to be added.
    bad
        (ny, nx) True where a pixel must not be used; a stamp with a bad pixel near its centre is dropped. Or a tuple
        of planes, each of which may forbid a pixel.
    positions
        (n, 2) x, y of stars, 0-based.
    order, sum_order, background_order
        Polynomial degrees of the kernel's shape, its sum, and the background over the field; lowered when the
        stamps are too few.
    fit_half
        Half size of the pixels compared around each star.
    systematic
        Fraction of the target's flux added in quadrature to the noise, so that the brightest star does not
        decide alone.
    towards_first
        How many times the reference's noise (``reference_variance``) pulls the kernel towards the first function of the
        basis: where stars have no light, noise alone would make a kernel that smooths the reference.
    reference_variance
        (ny, nx); needed with ``towards_first``.

    Raises
    ------
    NoWorkFoundError
        Fewer than three usable stamps.
    """
    stamps, kept = [], []
    gram = None
    if towards_first > 0:
        images = basis.images().reshape(basis.size, -1)
        gram = towards_first * (images @ images.T)
        gram[0] = gram[:, 0] = 0.0
    variances = variance if isinstance(variance, tuple) else (variance,)
    forbidden = bad if isinstance(bad, tuple) else (bad,)
    for index, (x, y) in enumerate(positions):
        stamp = _make_stamp(reference, target, variances, forbidden, (x, y), basis, fit_half, systematic)
        if stamp is not None:
            if gram is not None and reference_variance is not None:
                noise = float(reference_variance[round(float(y)), round(float(x))])
                stamp.matrix[:-1, :-1] += gram * (noise * stamp.n_pixels / stamp.mean_variance)
            stamps.append(stamp)
            kept.append(index)
    if len(stamps) < MIN_STAMPS:
        raise NoWorkFoundError(
            f"kernel matching: {len(stamps)} usable stars of {len(positions)} candidates, at least {MIN_STAMPS} "
            "unsaturated stars common to both images are needed"
        )
    # Below some stamps per coefficient the polynomial would follow single stars.
    while order > 0 and len(stamps) < 4 * _n_terms(order):
        order -= 1
    sum_order, background_order = min(sum_order, order), min(background_order, order)
    xy = positions[kept]
    terms = _monomials(xy[:, 0], xy[:, 1], target.shape, order)
    n_functions, n_terms = basis.size, _n_terms(order)
    free = np.ones((n_functions + 1, n_terms), dtype=bool)
    free[0, _n_terms(sum_order) :] = False
    free[-1, _n_terms(background_order) :] = False
    selection = np.flatnonzero(free.ravel())
    good = np.ones(len(stamps), dtype=bool)
    matrices = np.array([s.matrix for s in stamps])
    vectors = np.array([s.vector for s in stamps])
    solution, condition, chi2 = np.zeros(free.shape), np.nan, np.zeros(len(stamps))
    for _ in range(n_iterations):
        solution, condition = _solve(matrices[good], vectors[good], terms[good], selection, free.shape)
        local = terms @ solution.T
        chi2 = _stamp_chi2(stamps, matrices, vectors, local)
        centre = np.median(chi2[good])
        spread = 1.4826 * np.median(np.abs(chi2[good] - centre)) + 0.05 * centre
        survivors = chi2 < centre + clip * spread
        if survivors.sum() < max(MIN_STAMPS, good.sum() // 2) or (survivors == good).all():
            break
        good = survivors
    result = KernelSolution(
        basis,
        (target.shape[0], target.shape[1]),
        order,
        solution[:-1],
        order,
        solution[-1],
        np.zeros(0, bool),
    )
    result.used = np.zeros(len(positions), dtype=bool)
    result.used[np.array(kept)[good]] = True
    result.metrics = _metrics(result, stamps, good, chi2, condition)
    return result


def _make_stamp(
    reference: NDArray[np.float32],
    target: NDArray[np.float32],
    variance: tuple[NDArray[np.float32], ...],
    bad: tuple[NDArray[np.bool_], ...],
    position: tuple[float, float],
    basis: GaussianBasis,
    fit_half: int,
    systematic: float,
) -> _Stamp | None:
    """Normal equations of one star, or None when pixels are missing."""
    x, y = round(float(position[0])), round(float(position[1]))
    outer = fit_half + basis.half
    ny, nx = target.shape
    if x < outer or y < outer or x >= nx - outer or y >= ny - outer:
        return None
    wide = np.s_[y - outer : y + outer + 1, x - outer : x + outer + 1]
    near = np.s_[y - fit_half : y + fit_half + 1, x - fit_half : x + fit_half + 1]
    without = np.logical_or.reduce([plane[wide] for plane in bad])
    inner = without[basis.half : -basis.half, basis.half : -basis.half] if basis.half else without
    core = inner[
        fit_half - fit_half // 2 : fit_half + fit_half // 2 + 1,
        fit_half - fit_half // 2 : fit_half + fit_half // 2 + 1,
    ]
    if core.any() or without.mean() > 0.05:
        return None
    # A few bad pixels far from the star weigh nothing; convolution sees them as sky.
    source = np.where(without, 0.0, reference[wide]).astype(np.float64)
    aim = np.where(inner, 0.0, target[near]).astype(np.float64)
    noise = sum(plane[near].astype(np.float64) for plane in variance)
    weight = np.where(inner, 0.0, 1.0 / (noise + (systematic * aim) ** 2)).ravel()
    columns = np.concatenate([basis.convolve(source).reshape(basis.size, -1), np.ones((1, aim.size))])
    weighted = columns * weight
    flat = aim.ravel()
    return _Stamp(
        matrix=weighted @ columns.T,
        vector=weighted @ flat,
        target_square=float(weight @ flat**2),
        n_pixels=int((weight > 0).sum()),
        peak=float(aim.max()),
        mean_variance=float(1.0 / np.mean(weight[weight > 0])),
    )


def _solve(
    matrices: Float64, vectors: Float64, terms: Float64, selection: NDArray[np.intp], shape: tuple[int, int]
) -> tuple[Float64, float]:
    """Coefficients (n_functions + 1, n_terms) and the condition number of the scaled equations."""
    n_functions, n_terms = shape
    outer = (terms[:, :, None] * terms[:, None, :]).reshape(len(terms), -1)
    blocks = (matrices.reshape(len(terms), -1).T @ outer).reshape(n_functions, n_functions, n_terms, n_terms)
    full = blocks.transpose(0, 2, 1, 3).reshape(n_functions * n_terms, n_functions * n_terms)
    right = (vectors.T @ terms).ravel()
    A, b = full[np.ix_(selection, selection)], right[selection]
    scale = 1.0 / np.sqrt(np.maximum(np.diag(A), 1e-300))
    A = A * scale[:, None] * scale
    eigenvalues, eigenvectors = np.linalg.eigh(A)
    floor = _RIDGE * eigenvalues[-1]
    solved = eigenvectors @ ((eigenvectors.T @ (b * scale)) * (eigenvalues / (eigenvalues**2 + floor**2)))
    out = np.zeros(n_functions * n_terms)
    out[selection] = solved * scale
    return out.reshape(shape), float(eigenvalues[-1] / max(eigenvalues[0], floor))


def _stamp_chi2(stamps: list[_Stamp], matrices: Float64, vectors: Float64, local: Float64) -> Float64:
    squares = np.array([s.target_square for s in stamps])
    quadratic = np.einsum("si,sij,sj->s", local, matrices, local)
    linear = np.einsum("si,si->s", local, vectors)
    return np.asarray((squares - 2.0 * linear + quadratic) / np.array([max(s.n_pixels, 1) for s in stamps]))


def _metrics(
    solution: KernelSolution, stamps: list[_Stamp], good: NDArray[np.bool_], chi2: Float64, condition: float
) -> dict[str, float]:
    ny, nx = solution.shape
    sums = [
        float(solution.kernel(x, y).sum())
        for x in np.linspace(0, nx - 1, 4)
        for y in np.linspace(0, ny - 1, 4)
    ]
    peaks = np.array([s.peak for s in stamps])[good]
    scales = np.sqrt([s.mean_variance for s in stamps])[good]
    return {
        "sum": float(np.mean(sums)),
        "sum_rms": float(np.std(sums)),
        "condition": condition,
        "chi2": float(np.median(chi2[good])),
        "residual": float(np.median(np.sqrt(np.maximum(chi2[good], 0)) * scales / np.maximum(peaks, 1e-9))),
        "n_stamps": float(good.sum()),
    }


def select_stamps(
    x: Float64,
    y: Float64,
    snr: Float64,
    shape: tuple[int, int],
    *,
    cells: int = 8,
    per_cell: int = 6,
    isolation: float = 20.0,
) -> NDArray[np.intp]:
    """Choose stars spread evenly over a grid, best signal first, none with a comparable neighbour.

    Parameters
    ----------
    x, y, snr
        (n,) positions and signal-to-noise of usable stars.
    isolation
        Pixels within which a neighbour of at least a fifth of the star's signal disqualifies it.

    Returns
    -------
    Indices of the chosen stars.
    """
    from scipy.spatial import cKDTree

    if len(x) == 0:
        return np.zeros(0, dtype=np.intp)
    tree = cKDTree(np.stack([x, y], axis=1))
    chosen: list[int] = []
    counts = np.zeros((cells, cells), dtype=int)
    column = np.clip((np.asarray(x) * cells / shape[1]).astype(int), 0, cells - 1)
    row = np.clip((np.asarray(y) * cells / shape[0]).astype(int), 0, cells - 1)
    for index in np.argsort(-np.asarray(snr)):
        if counts[row[index], column[index]] >= per_cell:
            continue
        neighbours = [n for n in tree.query_ball_point((x[index], y[index]), isolation) if n != index]
        if any(snr[n] > 0.2 * snr[index] for n in neighbours):
            continue
        chosen.append(int(index))
        counts[row[index], column[index]] += 1
    return np.array(chosen, dtype=np.intp)
