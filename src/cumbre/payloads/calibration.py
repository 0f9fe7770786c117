"""Master calibrations of one detector: bias, dark, flat and defects from several frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cumbre.core.errors import BadFileError, NotFoundError, UnprocessableDataError

if TYPE_CHECKING:
    from cumbre.payloads.exposure import Exposure
    from cumbre.payloads.raw import RawDetector

FloatImage = NDArray[np.float32]
PARTS = ("bias", "dark", "flat", "fringe", "defects", "brighter_fatter")
MOST_KERNEL_PX = 65
FRINGE_SMOOTH_PX = 101
"""Sigma of what is background and not fringe."""
PAIR_LEVELS = 0.03
"""Relative difference of level up to which two flats make a pair."""
_PLANES = tuple(name.upper() for name in PARTS)


@dataclass(frozen=True, slots=True)
class Calibrations:
    """What is applied to a raw detector; each part may be absent (None). Frames have the detector's shape.

    Attributes
    ----------
    bias
        float32, ADU above the overscan (with the bias level where the detector has no overscan).
    dark
        float32, electrons per second.
    flat
        float32, response relative to the detector's median.
    fringe
        float32, pattern of the night sky relative to its level (mean 0), of the flattened image.
    defects
        bool.
    brighter_fatter
        float32 (n, n), n odd: kernel of the brighter-fatter effect, per electron.
    metadata
        Text and numbers stored with it: instrument, detector, band, n_bias, n_flat, day_obs…
    """

    bias: FloatImage | None = None
    dark: FloatImage | None = None
    flat: FloatImage | None = None
    fringe: FloatImage | None = None
    defects: NDArray[np.bool_] | None = None
    brighter_fatter: FloatImage | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def check(self, shape: tuple[int, int], where: str) -> None:
        """Compare the parts' shapes with the detector's.

        Raises
        ------
        UnprocessableDataError
            A part has another shape.
        """
        for name in PARTS:
            part = getattr(self, name)
            if part is None:
                continue
            if name == "brighter_fatter":
                n = part.shape[0]
                if part.shape != (n, n) or n % 2 == 0 or n > MOST_KERNEL_PX or not np.isfinite(part).all():
                    raise UnprocessableDataError(
                        f"{where}: the brighter-fatter kernel has the shape {part.shape}; expected finite numbers, odd "
                        f"and square, at most {MOST_KERNEL_PX}"
                    )
            elif part.shape != shape:
                raise UnprocessableDataError(
                    f"{where}: the {name} has the shape {part.shape}, the detector {shape}; "
                    "take calibrations of the same detector and read-out mode"
                )

    def save(self, path: str | Path) -> None:
        """Write one FITS file, HDUs BIAS, DARK, FLAT, FRINGE, DEFECTS, BRIGHTER_FATTER as far as there are any; atomic."""
        import fitsio

        from cumbre.stores.files import write_atomic

        header = [{"name": key.upper()[:8], "value": value} for key, value in self.metadata.items()]
        with fitsio.FITS("mem://", "rw") as fits:
            fits.write(None, header=header)
            for name in _PLANES:
                plane = getattr(self, name.lower())
                if plane is not None:
                    fits.write(plane.astype(np.uint8) if name == "DEFECTS" else plane, extname=name)
                    fits[-1].write_checksum()
            content = bytes(fits.read_raw())
        write_atomic(Path(path), content)

    @classmethod
    def load(cls, path: str | Path) -> Calibrations:
        """Read a file of :meth:`save`.

        Raises
        ------
        NotFoundError
            No such file.
        BadFileError
            Not such a file.
        """
        import fitsio

        path = Path(path)
        if not path.is_file():
            raise NotFoundError(
                f"calibrations {path}: there is no such file; make them with combine_bias and combine_flat"
            )
        parts: dict[str, Any] = {}
        try:
            with fitsio.FITS(str(path)) as fits:
                header = fits[0].read_header()
                skip = {"SIMPLE", "BITPIX", "NAXIS", "EXTEND", "CHECKSUM", "DATASUM", "COMMENT", "HISTORY"}
                metadata = {key.lower(): header[key] for key in header if key and key not in skip}
                for hdu in fits[1:]:
                    name = hdu.get_extname()
                    if name in _PLANES:
                        parts[name.lower()] = hdu.read()
        except (OSError, ValueError, AttributeError) as error:
            raise BadFileError(f"calibrations {path}: not readable: {error}") from error
        if not parts:
            raise BadFileError(f"calibrations {path}: none of the HDUs {', '.join(_PLANES)} is in the file")
        return cls.of_planes(parts, metadata)

    @classmethod
    def of_planes(
        cls, planes: Mapping[str, NDArray[Any]], metadata: dict[str, Any] | None = None
    ) -> Calibrations:
        """From arrays as files hold them, by the names of the parts."""
        parts: dict[str, Any] = {
            name: plane > 0 if name == "defects" else np.asarray(plane, np.float32)
            for name, plane in planes.items()
        }
        return cls(**parts, metadata=metadata or {})

    def for_flat(self, flat: FloatImage | None) -> Calibrations:
        """The same with another flat (one bias serves all filters)."""
        return replace(self, flat=flat)


@dataclass(frozen=True, slots=True)
class BrighterFatter:
    """A measured kernel.

    Attributes
    ----------
    kernel
        float32 (n, n), per electron.
    n_pairs, levels
        Pairs of flats, and their levels in electrons.
    neighbour, neighbour_err
        Covariance of nearest neighbours over the level's square, per electron.
    """

    kernel: FloatImage
    n_pairs: int
    levels: NDArray[np.float64]
    neighbour: float
    neighbour_err: float


@njit(cache=True)
def _clipped_mean(stack, clip):  # type: ignore[no-untyped-def]
    n, ny, nx = stack.shape
    out = np.empty((ny, nx), np.float32)
    values, work = np.empty(n, np.float32), np.empty(n, np.float32)
    for j in range(ny):
        for i in range(nx):
            for k in range(n):
                values[k] = stack[k, j, i]
            middle = np.median(values)
            for k in range(n):
                work[k] = abs(values[k] - middle)
            sigma = 1.4826 * np.median(work)
            total, count = 0.0, 0
            for k in range(n):
                if work[k] <= clip * sigma + 1e-12:
                    total += values[k]
                    count += 1
            out[j, i] = total / count if count else middle
    return out


def clipped_mean(stack: FloatImage, clip: float = 4.0) -> FloatImage:
    """Mean over the first axis after leaving out what is ``clip`` robust sigma from the median.

    One frame is returned as it is, of two frames the mean; of three or four the median, because so few give
    no useful sigma.
    """
    if stack.shape[0] <= 2:
        return np.asarray(stack.mean(axis=0), np.float32)
    if stack.shape[0] <= 4:
        return np.asarray(np.median(stack, axis=0), np.float32)
    result: FloatImage = _clipped_mean(np.ascontiguousarray(stack, np.float32), clip)
    return result


def _same_detector(raws: Sequence[RawDetector], what: str) -> None:
    if not raws:
        raise UnprocessableDataError(f"{what}: no frames were given")
    kinds = {(raw.instrument.name, raw.detector.name) for raw in raws}
    if len(kinds) != 1:
        raise UnprocessableDataError(f"{what}: frames of different detectors: {sorted(kinds)}")


def combine_bias(raws: Sequence[RawDetector]) -> FloatImage:
    """Master bias, ADU above the overscan, of the detector's shape.

    Raises
    ------
    UnprocessableDataError
        No frames, or frames of different detectors.
    """
    from cumbre.payloads.isr import detector_planes

    _same_detector(raws, "bias")
    return clipped_mean(np.stack([detector_planes(raw, in_adu=True)[0] for raw in raws]))


def combine_dark(raws: Sequence[RawDetector], bias: FloatImage | None) -> FloatImage:
    """Master dark, electrons per second.

    Raises
    ------
    UnprocessableDataError
        No frames, different detectors, or dark time zero.
    """
    from cumbre.payloads.isr import detector_planes

    _same_detector(raws, "dark")
    frames = []
    for raw in raws:
        if not raw.metadata.dark_s > 0:
            raise UnprocessableDataError(
                f"dark {raw.path}: dark time {raw.metadata.dark_s} s; expected more than 0"
            )
        frames.append(detector_planes(raw, Calibrations(bias=bias))[0] / np.float32(raw.metadata.dark_s))
    return clipped_mean(np.stack(frames))


def combine_flat(
    raws: Sequence[RawDetector], bias: FloatImage | None = None, dark: FloatImage | None = None
) -> FloatImage:
    """Master flat: response relative to the median of the well-lit pixels.

    Gain errors between amplifiers are part of it, so they vanish from flattened images.

    Raises
    ------
    UnprocessableDataError
        No frames, frames of different detectors or filters, no light, or saturated frames.
    """
    from cumbre.payloads.isr import detector_planes

    _same_detector(raws, "flat")
    filters = {raw.metadata.filter for raw in raws}
    if len(filters) != 1:
        raise UnprocessableDataError(f"flat: frames of different filters: {sorted(filters)}")
    frames = []
    for raw in raws:
        image, _, mask = detector_planes(raw, Calibrations(bias=bias, dark=dark))
        saturated = float(np.mean((mask & 2) > 0))
        if saturated > 0.05:
            raise UnprocessableDataError(f"flat {raw.path}: {saturated:.0%} of the pixels are saturated")
        level = _lit_median(image)
        if not level > 100:
            raise UnprocessableDataError(f"flat {raw.path}: {level:.0f} electrons; expected more than 100")
        frames.append(image / np.float32(level))
    flat = clipped_mean(np.stack(frames))
    return np.asarray(flat / np.float32(_lit_median(flat)), np.float32)


def combine_fringe(exposures: Sequence[Exposure]) -> FloatImage:
    """Fringe frame from flattened images of different fields in one filter: their pattern relative to the sky.

    Parameters
    ----------
    exposures
        After instrument signature removal without a fringe frame, sky included; five or more, each pointing
        elsewhere, so that stars go.

    Raises
    ------
    UnprocessableDataError
        Fewer than five, of different filters or detectors, or without sky.
    """
    import cv2

    if len(exposures) < 5:
        raise UnprocessableDataError(f"fringe: {len(exposures)} images; expected five or more")
    kinds = {(e.metadata.get("physical_filter"), e.metadata.get("detector"), e.shape) for e in exposures}
    if len(kinds) != 1:
        raise UnprocessableDataError(
            f"fringe: images of different filters or detectors: {sorted(map(str, kinds))}"
        )
    frames = []
    for exposure in exposures:
        level = float(np.median(exposure.image[::5, ::5]))
        if not level > 100:
            raise UnprocessableDataError(f"fringe: sky of {level:.0f} electrons; expected more than 100")
        frames.append(exposure.image / np.float32(level) - np.float32(1))
    pattern = np.median(np.stack(frames), axis=0).astype(np.float32)  # stars are never below the sky
    broad = cv2.GaussianBlur(pattern, (0, 0), FRINGE_SMOOTH_PX, borderType=cv2.BORDER_REFLECT)
    return np.asarray(pattern - broad, np.float32)


def measure_brighter_fatter(raws: Sequence[RawDetector], bias: FloatImage | None = None) -> BrighterFatter:
    """Kernel of the brighter-fatter effect from pairs of flats of one detector, of any filters and levels.

    Frames that follow one another with levels within ``PAIR_LEVELS`` make a pair; what they have in common cancels.

    Raises
    ------
    UnprocessableDataError
        No pair, or the neighbours' covariance is not significant.
    """
    from cumbre.payloads.isr import detector_planes
    from cumbre.payloads.kernels.brighter_fatter import kernel_of_covariances, pair_covariances, smooth_tail

    _same_detector(raws, "brighter-fatter kernel")
    found, before, n = [], None, 0
    for raw in raws:
        image, _, mask = detector_planes(raw, Calibrations(bias=bias))
        level = _lit_median(image)
        good = (mask == 0) & (image > 0.7 * level) & (image < 1.3 * level)
        if before is None or abs(level / before[1] - 1) > PAIR_LEVELS:
            before = image, level, good
            continue
        found.append(pair_covariances(image, before[0], good & before[2]))
        before = None
        n += 1
    if not found:
        raise UnprocessableDataError(
            f"brighter-fatter kernel: no two of {len(raws)} flats of {raws[0].detector.name} that follow one another have "
            f"levels within {PAIR_LEVELS:.0%}"
        )
    levels = np.array([level for level, *_ in found])
    covariances = np.array([covariance for _, covariance, _ in found])
    # of the nearest neighbours, relative to the level's square: the effect, and what noise alone would give
    near = covariances[:, [0, 1], [1, 0]].mean(axis=1) / levels**2
    errors = np.array([1 / (level * np.sqrt(2 * pairs)) for level, _, pairs in found])
    weight = 1 / errors**2
    mean, error = float(np.sum(near * weight) / weight.sum()), float(1 / np.sqrt(weight.sum()))
    if not mean > 3 * error:
        raise UnprocessableDataError(
            f"brighter-fatter kernel: covariance of neighbours {mean:.2e} ± {error:.1e} per electron from {n} pairs of "
            f"{raws[0].detector.name}; expected more than 3 sigma: more or brighter flats are needed"
        )
    kernel = kernel_of_covariances(levels, smooth_tail(levels, covariances)).astype(np.float32)
    return BrighterFatter(kernel, n, levels, mean, error)


def _lit_median(image: FloatImage) -> float:
    """Median of the pixels brighter than a third of the bright level (a vignetted rim does not count)."""
    sample = image[::3, ::3]
    bright = float(np.percentile(sample, 90))
    lit = sample[sample > bright / 3]
    return float(np.median(lit)) if lit.size else float("nan")


def find_defects(
    bias: FloatImage | None = None, dark: FloatImage | None = None, flat: FloatImage | None = None
) -> NDArray[np.bool_]:
    """Pixels that differ from their surroundings: 8 sigma in bias and dark, 25 % in the flat.

    Raises
    ------
    UnprocessableDataError
        Nothing to look at.
    """
    from scipy.ndimage import median_filter

    found: NDArray[np.bool_] | None = None
    for plane, relative in ((bias, False), (dark, False), (flat, True)):
        if plane is None:
            continue
        local = median_filter(plane, size=(1, 9)) if plane.shape[1] >= 9 else plane
        residual = plane - local
        if relative:
            bad = np.abs(residual) > 0.25 * np.maximum(np.abs(local), 0.05)
        else:
            sigma = 1.4826 * float(np.median(np.abs(residual))) + 1e-6
            bad = np.abs(residual) > 8 * sigma
        found = bad if found is None else found | bad
    if found is None:
        raise UnprocessableDataError("defects: give at least one of bias, dark, flat")
    return found
