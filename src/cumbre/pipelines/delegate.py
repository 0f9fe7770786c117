"""Takes parts out of an exposure that is in memory already."""

from __future__ import annotations

from typing import Any

from lsst.daf.butler import StorageClassDelegate

from cumbre.payloads.exposure import Exposure


class ExposureDelegate(StorageClassDelegate):  # type: ignore[misc]
    """Components ``metadata`` and ``metrics`` of an :class:`Exposure`."""

    def getComponent(self, composite: Exposure, componentName: str) -> Any:  # noqa: N802
        """Return one of the two."""
        if componentName not in ("metadata", "metrics"):
            raise AttributeError(
                f"an exposure has no component {componentName!r}; it has metadata and metrics"
            )
        return getattr(composite, componentName)
