"""How the Butler reads and writes our FITS files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lsst.daf.butler import FormatterV2
from lsst.resources import ResourcePath

from cumbre.repository.fits_image import FitsImage, read_fits, write_fits


class FitsFormatter(FormatterV2):  # type: ignore[misc]
    """Any FITS file as a :class:`FitsImage`; component ``header`` reads only the primary header."""

    default_extension = ".fits"
    supported_extensions: ClassVar[frozenset[str]] = frozenset(
        {".fits", ".fits.fz", ".fits.gz", ".fits.bz2", ".fit", ".gz", ".bz2", ".fz"}
    )
    can_read_from_local_file = True

    @classmethod
    def validate_extension(cls, location: Any) -> None:
        """Accept every name: cameras of the world end theirs with .FITS.bz2 and worse."""

    def read_from_local_file(self, path: str, component: str | None = None, expected_size: int = -1) -> Any:
        """Read the file, or its primary header."""
        del expected_size
        if component == "header":
            from cumbre.core.header_files import read_headers

            return read_headers(Path(path), primary_only=True)[0]
        return read_fits(Path(path))

    def write_local_file(self, in_memory_dataset: FitsImage, uri: ResourcePath) -> None:
        """Write the whole file."""
        write_fits(in_memory_dataset, Path(uri.ospath))
