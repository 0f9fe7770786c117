"""Tables that people send: VOTable, CSV, TSV, FITS and Parquet to Arrow, distrusting every byte.

Formats are told by their first bytes. XML is read without any DTD, so neither entities nor external files exist;
streams that point elsewhere and compressed ones are refused. Sizes are bounded before memory is taken.
"""

from __future__ import annotations

import io
import re
import tempfile
import warnings
from typing import TYPE_CHECKING, Any
from xml.sax.handler import ContentHandler
from xml.sax.xmlreader import AttributesImpl

from cumbre.access.http.base import TooLargeError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ROWS = 2_000_000
MAX_CELLS = 20_000_000
MAX_MEMORY = 1 << 30
MAX_COLUMNS = 1000
TABLE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_MAX_ELEMENTS = 200


def parse_upload_parameter(values: list[str]) -> dict[str, str]:
    """Name of each table → ``param:FIELD`` or URL, of UPLOAD parameters (``name,where``, ``;`` between).

    Raises
    ------
    UsageError
        Another form, a name that is none, or two tables of one name.
    """
    out: dict[str, str] = {}
    for item in (part.strip() for value in values for part in value.split(";") if part.strip()):
        name, comma, where = item.partition(",")
        name, where = name.strip(), where.strip()
        if name.lower().startswith("tap_upload."):
            name = name[len("tap_upload.") :]
        if not comma or not where:
            raise UsageError(f"UPLOAD = {item[:80]!r}: expected NAME,param:FIELD or NAME,URL")
        if not TABLE_NAME.fullmatch(name):
            raise UsageError(
                f"UPLOAD: table name {name[:80]!r}: expected a letter, then up to 63 letters, digits or _"
            )
        if name.lower() in (other.lower() for other in out):
            raise UsageError(f"UPLOAD: two tables are called {name}")
        if not where.lower().startswith(("param:", "http://", "https://")):
            raise UsageError(
                f"UPLOAD: {where[:80]!r}: expected param:FIELD with the file in the same request, or an http URL"
            )
        out[name] = where
    return out


def read_table(content: bytes, name: str) -> pa.Table:
    """An uploaded file as an Arrow table; units, UCDs and descriptions are in the fields' metadata.

    Parameters
    ----------
    content
        The whole file.
    name
        For messages.

    Raises
    ------
    UsageError
        It is no table that is known here, or it is damaged.
    TooLargeError
        It has more rows, columns or bytes in memory than are allowed.
    """
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if (
        content[:2] == b"\x1f\x8b"
        or content[:3] in (b"BZh", b"\xfd7z")
        or content[:4] in (b"PK\x03\x04", b"\x28\xb5\x2f\xfd")
    ):
        raise UsageError(f"upload {name}: compressed files are not taken; send it as it is, or as Parquet")
    if not start:
        raise UsageError(f"upload {name}: the file is empty")
    try:
        if content[:4] == b"PAR1":
            table = _parquet(content, name)
        elif content[:9] == b"SIMPLE  =":
            table = _fits(content, name)
        elif start[:1] == b"<":
            table = _votable(content, name)
        else:
            table = _separated(content, name)
    except (UsageError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"upload {name}: it cannot be read as a table: {str(error)[:300]}") from error
    return _checked(table, name)


def _checked(table: pa.Table, name: str) -> pa.Table:
    seen: set[str] = set()
    if not 0 < table.num_columns <= MAX_COLUMNS:
        raise TooLargeError(f"upload {name}: {table.num_columns} columns: expected 1 to {MAX_COLUMNS}")
    _bound(name, table.num_rows, table.num_columns, table.nbytes)
    for column in table.column_names:
        if column.lower() in seen:
            raise UsageError(f"upload {name}: two columns are called {column} (capitals do not count)")
        if not column or len(column) > 128 or not column.isprintable():
            raise UsageError(f"upload {name}: {column[:60]!r} cannot be the name of a column")
        seen.add(column.lower())
    return table


def _bound(name: str, rows: int, columns: int, size: int) -> None:
    if rows > MAX_ROWS or rows * columns > MAX_CELLS or size > MAX_MEMORY:
        raise TooLargeError(
            f"upload {name}: {rows:,} rows of {columns} columns, {size:,} bytes: at most {MAX_ROWS:,} rows, "
            f"{MAX_CELLS:,} values and {MAX_MEMORY:,} bytes are taken"
        )


# Parquet


def _parquet(content: bytes, name: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(io.BytesIO(content))
    declared = file.metadata
    _bound(name, declared.num_rows, declared.num_columns, 0)
    batches, size = [], 0
    for batch in file.iter_batches(batch_size=8192):
        size += batch.nbytes
        _bound(name, declared.num_rows, declared.num_columns, size)
        batches.append(batch)
    table = pa.Table.from_batches(batches, schema=file.schema_arrow).replace_schema_metadata(None)
    return _plain(table)


def _plain(table: pa.Table) -> pa.Table:
    """Types that the query engine knows: no dictionaries, decimals as doubles, times as ISO text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    arrays, fields = [], []
    for index, item in enumerate(table.schema):
        array, kind = table.column(index), item.type
        if pa.types.is_dictionary(kind):
            array = array.cast(kind.value_type)
        elif pa.types.is_decimal(kind):
            array = array.cast(pa.float64())
        elif pa.types.is_unsigned_integer(kind):
            array = array.cast(pa.int64())
        elif pa.types.is_int8(kind):
            array = array.cast(pa.int16())
        elif pa.types.is_float16(kind):
            array = array.cast(pa.float32())
        elif pa.types.is_temporal(kind):
            array = pc.strftime(array.cast(pa.timestamp("us")), format="%Y-%m-%dT%H:%M:%S")
        elif pa.types.is_null(kind) or pa.types.is_large_string(kind):
            array = array.cast(pa.string())
        arrays.append(array)
        fields.append(pa.field(item.name, array.type, True, item.metadata))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


# CSV and TSV


def _separated(content: bytes, name: str) -> pa.Table:
    import pyarrow.csv as pc

    text = content.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in text[:4096]:
        raise UsageError(f"upload {name}: expected VOTable, CSV, TSV, FITS or Parquet; this is neither")
    first = text.split(b"\n", 1)[0]
    delimiter = "\t" if first.count(b"\t") > first.count(b",") else ","
    _bound(name, text.count(b"\n"), first.count(delimiter.encode()) + 1, 0)
    table = pc.read_csv(
        io.BytesIO(text),
        parse_options=pc.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pc.ConvertOptions(null_values=["", "null", "NULL"], strings_can_be_null=True),
    )
    return _plain(table)


# FITS


def _fits(content: bytes, name: str) -> pa.Table:
    import fitsio

    with tempfile.NamedTemporaryFile(suffix=".fits", prefix="upload-") as stream:
        stream.write(content)
        stream.flush()
        with fitsio.FITS(stream.name) as file:
            hdu = next((h for h in file if h.get_exttype() in ("BINARY_TBL", "ASCII_TBL")), None)
            if hdu is None:
                raise UsageError(f"upload {name}: the FITS file has no table")
            header = hdu.read_header()
            rows, columns = int(header["NAXIS2"]), int(header["TFIELDS"])
            if int(header["NAXIS1"]) * rows > len(content) or "ZTABLE" in header:
                raise UsageError(f"upload {name}: the FITS table is cut short or compressed")
            _bound(name, rows, columns, int(header["NAXIS1"]) * rows)
            data = hdu.read()
    units = {
        str(header[f"TTYPE{i}"]).strip(): str(header.get(f"TUNIT{i}") or "").strip()
        for i in range(1, columns + 1)
    }
    return _from_numpy(data, {key: {"unit": unit} for key, unit in units.items() if unit}, name)


def _from_numpy(data: Any, about: dict[str, dict[str, str]], name: str) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    arrays, fields = [], []
    for column in data.dtype.names:
        values = data[column]
        if values.dtype.kind == "O":
            raise UsageError(
                f"upload {name}: column {column} holds arrays of varying length, which are not taken"
            )
        if values.ndim > 1:
            array = pa.array(values.reshape(len(values), -1).astype(values.dtype.newbyteorder("=")).tolist())
        elif values.dtype.kind == "S":
            array = pa.array([v.decode("latin-1").rstrip() or None for v in values.tolist()], pa.string())
        elif values.dtype.kind == "U":
            array = pa.array([v.rstrip() or None for v in values.tolist()], pa.string())
        else:
            array = pa.array(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="))))
        arrays.append(array)
        fields.append(pa.field(column, array.type, True, about.get(column) or None))
    return _plain(pa.Table.from_arrays(arrays, schema=pa.schema(fields)))


# VOTable


class _Inspector(ContentHandler):
    """Looks through a VOTable before anything is built of it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.depth, self.rows, self.columns, self.width, self.tables = name, 0, 0, 0, 0, 0

    def startElement(self, tag: str, attributes: AttributesImpl) -> None:  # noqa: N802 (SAX)
        """Refuse what points elsewhere or would take more memory than it shows."""
        self.depth += 1
        if self.depth > _MAX_ELEMENTS:
            raise UsageError(f"upload {self.name}: elements are nested more than {_MAX_ELEMENTS} deep")
        local = tag.rpartition(":")[2]
        if local == "STREAM":
            if attributes.get("href"):
                raise UsageError(f"upload {self.name}: a STREAM that points elsewhere is not followed")
            if attributes.get("encoding", "base64") != "base64":
                raise UsageError(f"upload {self.name}: a STREAM must be base64 or absent")
        elif local == "FITS":
            raise UsageError(f"upload {self.name}: send the FITS file itself, not inside a VOTable")
        elif local == "TABLE":
            self.tables += 1
        elif local == "FIELD":
            self.columns += 1
            self.width += _cells(attributes.get("arraysize", ""), attributes.get("datatype", ""))
        elif local == "TR":
            self.rows += 1
        if self.tables <= 1:
            _bound(self.name, self.rows, max(self.width, 1), 0)

    def endElement(self, tag: str) -> None:  # noqa: N802 (SAX)
        """Count the depth."""
        del tag
        self.depth -= 1


def _cells(arraysize: str, datatype: str) -> int:
    """Values that one cell takes in memory (1 for what grows with its content); 16 letters count as one."""
    cells = 1
    for part in arraysize.split("x"):
        number = part.rstrip("*")
        if number.isdigit() and not part.endswith("*"):
            cells *= min(int(number), 1 << 40)
    return max(cells // 16, 1) if datatype in ("char", "unicodeChar") else cells


def _votable(content: bytes, name: str) -> pa.Table:
    from defusedxml import sax
    from defusedxml.common import DefusedXmlException

    try:
        inspector = _Inspector(name)
        sax.parseString(content, inspector, forbid_dtd=True, forbid_entities=True, forbid_external=True)
    except DefusedXmlException as error:
        raise UsageError(
            f"upload {name}: XML with a DTD or entities is not taken ({type(error).__name__})"
        ) from error
    from astropy.io.votable import parse_single_table
    from astropy.table import MaskedColumn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parsed = parse_single_table(io.BytesIO(content), verify="ignore")
        table = parsed.to_table(use_names_over_ids=True)
    import numpy as np
    import pyarrow as pa

    arrays, fields = [], []
    described = {item.name: item for item in parsed.fields}
    for column in table.columns.values():
        data = np.ma.getdata(column) if isinstance(column, MaskedColumn) else np.asarray(column)
        mask = np.ma.getmaskarray(column) if isinstance(column, MaskedColumn) else None
        if data.ndim > 1:
            array = pa.array(data.reshape(len(data), -1).tolist())
        elif data.dtype.kind in "OSU":
            hidden = mask.tolist() if mask is not None else [False] * len(data)
            array = _objects(data.tolist(), hidden)
        else:
            native = np.ascontiguousarray(data.astype(data.dtype.newbyteorder("=")))
            array = pa.array(native, mask=None if mask is None or native.dtype.kind == "f" else mask)
        item = described.get(column.name)
        about = {
            key: str(value)
            for key in ("unit", "ucd", "utype", "xtype", "description")
            if item is not None and (value := getattr(item, key, None))
        }
        arrays.append(array)
        fields.append(pa.field(column.name, array.type, True, about or None))
    return _plain(pa.Table.from_arrays(arrays, schema=pa.schema(fields)))


def _objects(values: list[Any], hidden: list[bool]) -> pa.Array:
    """Texts, or arrays of varying length, with nulls."""
    import numpy as np
    import pyarrow as pa

    if any(isinstance(value, np.ndarray) for value in values):
        return pa.array(
            [None if h else np.ma.getdata(v).tolist() for v, h in zip(values, hidden, strict=True)]
        )
    texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]
    return pa.array([None if h or not t else t for t, h in zip(texts, hidden, strict=True)], pa.string())
