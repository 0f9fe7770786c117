"""Takes the header out of a FITS image that is in memory already."""

from __future__ import annotations

from typing import Any

from lsst.daf.butler import StorageClassDelegate

from cumbre.repository.fits_image import FitsImage


class FitsDelegate(StorageClassDelegate):  # type: ignore[misc]
    """Component ``header`` of a :class:`FitsImage`."""

    def getComponent(self, composite: FitsImage, componentName: str) -> Any:  # noqa: N802
        """Return the primary header."""
        if componentName != "header":
            raise AttributeError(f"a FITS image has no component {componentName!r}; it has header")
        return composite.header
