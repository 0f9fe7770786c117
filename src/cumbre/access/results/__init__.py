"""Encoders: Arrow batches to documents, a piece at a time.

One function, :func:`write`. An error in mid-stream ends the document so that it can still be read and says
what happened; so does a limit that cut the rows.
"""

from __future__ import annotations

from cumbre.access.results.formats import FORMATS, Format, find_format, write

__all__ = ["FORMATS", "Format", "find_format", "write"]
