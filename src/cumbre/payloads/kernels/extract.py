"""Source extraction by sep, with its buffers grown only when a field needs it.

sep touches its whole pixel buffer at every call: a buffer that holds any field costs more than the detection itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import UnprocessableDataError

PIXELS = 300_000
"""Active pixels that an ordinary field needs."""
SUB_OBJECTS = 1024


def extract(image: NDArray[np.float32], threshold: float, **options: Any) -> Any:
    """``sep.extract`` of a native, contiguous image.

    Raises
    ------
    UnprocessableDataError
        The detection fails however large its buffers are.
    """
    import sep

    pixels, parts = min(PIXELS, max(image.size, 1000)), SUB_OBJECTS
    while True:
        sep.set_extract_pixstack(pixels)
        sep.set_sub_object_limit(parts)
        try:
            return sep.extract(image, threshold, **options)
        except Exception as error:  # sep raises bare Exception when a buffer overflows
            text = str(error)
            if "pixel buffer" in text and pixels < image.size:
                pixels = min(8 * pixels, image.size)
            elif "deblending" in text and parts < 100 * SUB_OBJECTS:
                parts *= 8
            else:
                raise UnprocessableDataError(f"star detection: {error}") from error
