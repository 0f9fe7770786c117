"""Parquet with the VOTable's description of the columns inside (VOParquet)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cumbre.access.results.ending import Rows
from cumbre.access.results.votable import header

if TYPE_CHECKING:
    from cumbre.access.query import Result
    from cumbre.access.results.formats import Write

_GROUP_BYTES = 32 << 20


class _Pipe(io.RawIOBase):
    """A file that can only be written forward."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._at = 0

    def writable(self) -> bool:
        return True

    def write(self, content: object) -> int:
        piece = bytes(content)  # type: ignore[call-overload]
        self._write(piece)
        self._at += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._at


def write(result: Result, write_bytes: Write, info: Mapping[str, str]) -> str:
    """Row groups of at most 32 MB, zstd."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = Rows(result)
    description = header(result.columns, info).replace("<DATA>\n", "") + "</TABLE>\n</RESOURCE>\n</VOTABLE>\n"
    schema = result.schema.with_metadata(
        {"IVOA.VOTable-Parquet.version": "1.0", "IVOA.VOTable-Parquet.content": description}
    )
    sink = pa.PythonFile(_Pipe(write_bytes), mode="w")
    with pq.ParquetWriter(sink, schema, compression="zstd", compression_level=1) as writer:
        waiting: list[pa.RecordBatch] = []
        size = 0
        for batch in rows:
            waiting.append(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
            size += batch.nbytes
            if size >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(waiting, schema=schema))
                waiting, size = [], 0
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting, schema=schema))
        word, text = rows.status
        writer.add_key_value_metadata({"QUERY_STATUS": word, "QUERY_MESSAGE": text})
    return rows.outcome
