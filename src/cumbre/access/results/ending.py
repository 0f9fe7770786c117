"""How every document begins and ends: the first batch decides whether there is a document at all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from cumbre.core.errors import CumbreError

if TYPE_CHECKING:
    import pyarrow as pa

    from cumbre.access.query import Result


class Rows:
    """Batches of a result; remembers how they ended.

    Raises at once what goes wrong before the first row; what goes wrong later ends the rows, and
    :attr:`status` says it.
    """

    def __init__(self, result: Result) -> None:
        self._result = result
        self._error: str | None = None
        stream = result.batches()
        first = next(stream, None)
        self._stream = stream if first is None else chain([first], stream)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._stream
        except CumbreError as error:
            self._error = str(error)

    @property
    def status(self) -> tuple[str, str]:
        """After the rows: ``OK``, ``OVERFLOW`` or ``ERROR``, and the words for it."""
        if self._error is not None:
            return "ERROR", f"after {self._result.rows:,} rows: {self._error}"
        if self._result.overflow is not None:
            return "OVERFLOW", self._result.overflow
        return "OK", f"{self._result.rows} rows"

    @property
    def outcome(self) -> str:
        """The status in one line; plain OK when all is well."""
        word, text = self.status
        return word if word == "OK" else f"{word}: {text}"
