"""The calibrated image of one detector: the type that payloads hand to one another."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from astropy.wcs import WCS

FloatImage = NDArray[np.float32]


class MaskPlane(IntFlag):
    """Bits of a mask image (uint16); the names are those of Rubin's pixel flags."""

    BAD = 1
    SAT = 2
    INTRP = 4
    CR = 8
    EDGE = 16
    DETECTED = 32
    DETECTED_NEGATIVE = 64
    SUSPECT = 128
    NO_DATA = 256
    STREAK = 512
    VIGNETTED = 1024
    INJECTED = 2048
    SAT_TEMPLATE = 4096

    @classmethod
    def unusable(cls) -> int:
        """Bits of pixels that must not be measured."""
        return int(cls.BAD | cls.SAT | cls.EDGE | cls.NO_DATA)


@dataclass(slots=True)
class Exposure:
    """Image, variance, mask, and what is known about them.

    Attributes
    ----------
    image, variance
        float32 of shape (ny, nx): electrons and electrons², background included until ``background`` is
        subtracted (``is_background_subtracted``).
    mask
        uint16 of shape (ny, nx), bits of :class:`MaskPlane`.
    psf
        A ``cumbre.payloads.kernels.psf`` model or None: ``psf.stamp(x, y)`` gives a normalised float32 stamp.
    zero_point
        AB magnitude of one electron in the whole exposure; NaN until calibrated.
    metadata
        obs_id, exposure_id, detector, band, mjd_mid_tai, exposure_s, … in our own names.
    metrics
        Numbers measured on the way (seeing_arcsec, sky_adu, n_stars, astrometric_rms_arcsec…).
    """

    image: FloatImage
    variance: FloatImage
    mask: NDArray[np.uint16]
    wcs: WCS | None = None
    psf: Any = None
    zero_point: float = float("nan")
    zero_point_err: float = float("nan")
    background: FloatImage | None = None
    is_background_subtracted: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(ny, nx)."""
        return self.image.shape[0], self.image.shape[1]

    def njy_per_electron(self) -> float:
        """Flux in nJy of one electron (AB: 3631 Jy at magnitude 0)."""
        return float(3631e9 * 10 ** (-0.4 * self.zero_point))
