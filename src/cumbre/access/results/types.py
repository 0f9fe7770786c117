"""Columns as Arrow holds them, and Arrow fields as columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cumbre.access.tables import Column
from cumbre.core.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

NUMBERS = ("unsignedByte", "short", "int", "long", "float", "double")
"""Numeric VOTable types, each fits in the next but one (long in double loses digits)."""


def is_array(column: Column) -> bool:
    """Whether a value is several numbers."""
    return column.datatype not in ("char", "unicodeChar") and column.arraysize not in (None, "1")


def arrow_type(column: Column) -> pa.DataType:
    """Arrow type of a column's values."""
    import pyarrow as pa

    if column.datatype in ("char", "unicodeChar"):
        return pa.string()
    kind = {
        "boolean": pa.bool_(), "unsignedByte": pa.uint8(), "short": pa.int16(), "int": pa.int32(),
        "long": pa.int64(), "float": pa.float32(), "double": pa.float64(),
    }[column.datatype]  # fmt: skip
    return pa.list_(kind) if is_array(column) else kind


def arrow_schema(columns: tuple[Column, ...]) -> pa.Schema:
    """Arrow schema of columns, what they mean in the fields' metadata."""
    import pyarrow as pa

    fields = []
    for column in columns:
        words = {
            "unit": column.unit, "ucd": column.ucd, "utype": column.utype, "xtype": column.xtype,
            "description": column.description, "datatype": column.datatype, "arraysize": column.arraysize or "",
        }  # fmt: skip
        fields.append(
            pa.field(column.name, arrow_type(column), metadata={k: v for k, v in words.items() if v})
        )
    return pa.schema(fields)


def column_of_field(field: pa.Field) -> Column:
    """A column described by an Arrow field: its type, and its metadata when there is some.

    Raises
    ------
    UserError
        A type that no column can have (nested structures, decimals beyond 18 digits are made double).
    """
    import pyarrow as pa

    words = {k.decode(): v.decode() for k, v in (field.metadata or {}).items()}
    kind, arraysize, xtype = field.type, None, words.get("xtype", "")
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        arraysize = str(kind.list_size) if types.is_fixed_size_list(kind) else "*"
        kind = kind.value_type
    datatype = _scalar(kind)
    if datatype is None:
        raise UserError(
            f"column {field.name}: Arrow type {field.type} cannot be used; numbers, text and times can"
        )
    if types.is_temporal(kind):
        xtype = xtype or "timestamp"
    if datatype == "char":
        arraysize = "*"
        datatype = "unicodeChar" if words.get("datatype") == "unicodeChar" else "char"
    return Column(
        field.name, datatype, words.get("arraysize") or arraysize, xtype, words.get("unit", ""),
        words.get("ucd", ""), words.get("utype", ""), words.get("description", ""),
    )  # fmt: skip


def _scalar(kind: pa.DataType) -> str | None:
    import pyarrow as pa

    types = pa.types
    exact = {
        pa.bool_(): "boolean", pa.uint8(): "unsignedByte", pa.int8(): "short", pa.int16(): "short",
        pa.uint16(): "int", pa.int32(): "int", pa.uint32(): "long", pa.int64(): "long", pa.uint64(): "long",
        pa.float16(): "float", pa.float32(): "float", pa.float64(): "double",
    }  # fmt: skip
    if kind in exact:
        return exact[kind]
    if types.is_decimal(kind):
        return "double"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind):
        return "char"
    if types.is_timestamp(kind) or types.is_date(kind):
        return "char"
    return None


def conform_table(rows: pa.Table) -> pa.Table:
    """An upload with the plain Arrow types of its columns: no dictionaries, times as ISO text, 64-bit lists.

    Raises
    ------
    UserError
        A value does not fit (an unsigned 64-bit number beyond the signed ones).
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    arrays, names = [], []
    for field in rows.schema:
        column = column_of_field(field)
        values = rows.column(field.name)
        try:
            if pa.types.is_dictionary(field.type):
                values = values.cast(field.type.value_type)
            if pa.types.is_timestamp(values.type):
                plain = values.cast(pa.timestamp("ms", tz=values.type.tz), safe=False)
                values = pc.strftime(plain, format="%Y-%m-%dT%H:%M:%S")
            arrays.append(values.cast(arrow_type(column)))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(f"uploaded column {field.name}: {error}") from error
        names.append(field)
    fields = [field.with_type(array.type) for field, array in zip(names, arrays, strict=True)]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))
