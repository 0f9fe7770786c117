"""Sky background on a mesh (sep), with objects and bad pixels left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatImage = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Background:
    """A background model.

    Attributes
    ----------
    level, rms
        float32 (ny, nx).
    global_level, global_rms
        Medians of the mesh.
    """

    level: FloatImage
    rms: FloatImage
    global_level: float
    global_rms: float


def measure_background(
    image: FloatImage, bad: NDArray[np.bool_] | None = None, *, mesh: int = 64, smooth: int = 3
) -> Background:
    """Background by clipped modes in ``mesh`` × ``mesh`` pixels, median-filtered over ``smooth`` meshes.

    Parameters
    ----------
    image
        float32 (ny, nx).
    bad
        Pixels to leave out: defects, saturated ones, detected objects.
    """
    import sep

    pixels = np.ascontiguousarray(image, np.float32)
    size = max(8, min(mesh, *pixels.shape))
    result = sep.Background(pixels, mask=bad, bw=size, bh=size, fw=smooth, fh=smooth)
    level, rms = result.back(dtype=np.float32), result.rms(dtype=np.float32)
    return Background(level, rms, float(result.globalback), float(result.globalrms))
