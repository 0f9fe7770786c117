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
    level
        float32 (ny, nx).
    global_level, global_rms
        Medians of the mesh.
    """

    level: FloatImage
    global_level: float
    global_rms: float


def measure_background(
    image: FloatImage,
    bad: NDArray[np.bool_] | None = None,
    *,
    mesh: int = 64,
    smooth: int = 3,
    step: int = 1,
) -> Background:
    """Background by clipped modes in ``mesh`` × ``mesh`` pixels, median-filtered over ``smooth`` meshes.

    Parameters
    ----------
    image
        float32 (ny, nx).
    bad
        Pixels to leave out: defects, saturated ones, detected objects.
    step
        Look at every ``step``-th column and row only: a first estimate in a fraction of the time.
    """
    import sep

    ny, nx = image.shape
    step = max(1, min(step, min(ny, nx) // (4 * mesh)))
    pixels = np.ascontiguousarray(image[::step, ::step], np.float32)
    without = None if bad is None else np.ascontiguousarray(bad[::step, ::step])
    size = max(8, min(mesh // step, *pixels.shape))
    result = sep.Background(pixels, mask=without, bw=size, bh=size, fw=smooth, fh=smooth)
    level = result.back(dtype=np.float32)
    if step > 1:
        import cv2

        level = np.asarray(cv2.resize(level, (nx, ny), interpolation=cv2.INTER_LINEAR))
    return Background(level, float(result.globalback), float(result.globalrms))
