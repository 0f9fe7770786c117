"""VOTable 1.4 or 1.5: BINARY2 or TABLEDATA, a batch at a time."""

from __future__ import annotations

import binascii
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from cumbre.access.results.binary2 import encode
from cumbre.access.results.ending import Rows
from cumbre.access.results.services import ServiceDescriptor, field_id
from cumbre.access.results.tabledata import encode_rows
from cumbre.access.tables import Column

if TYPE_CHECKING:
    from cumbre.access.query import Result
    from cumbre.access.results.formats import Write

_NAMESPACE = "http://www.ivoa.net/xml/VOTable/v1.3"
_INSTANCE = "http://www.w3.org/2001/XMLSchema-instance"
_LINE = 3 * 16384
"""Bytes of one line of base64 before it is encoded."""


def header(
    columns: tuple[Column, ...],
    info: Mapping[str, str],
    version: str = "1.4",
    services: Sequence[ServiceDescriptor] = (),
) -> str:
    """The beginning of a document, up to the fields."""
    wanted = {item.ref for service in services for item in service.inputs}
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<VOTABLE version="{version}" xmlns="{_NAMESPACE}" xmlns:xsi="{_INSTANCE}">',
        '<RESOURCE type="results">',
        '<INFO name="QUERY_STATUS" value="OK"/>',
    ]
    lines += [
        f"<INFO name={quoteattr(name)} value={quoteattr(_clean(text))}/>" for name, text in info.items()
    ]
    if any(column.ucd.startswith("pos.eq") for column in columns):
        lines.append('<COOSYS ID="ICRS" system="ICRS"/>')
    lines.append('<TABLE name="result">')
    for column in columns:
        identity = field_id(column.name)
        lines.append(field(column, identity if identity in wanted else ""))
        wanted.discard(identity)
    lines.append("<DATA>")
    return "\n".join(lines) + "\n"


def field(column: Column, identity: str = "") -> str:
    """A FIELD element."""
    attributes = {
        "ID": identity, "name": column.name, "datatype": column.datatype,
        "arraysize": column.arraysize or "", "xtype": column.xtype, "unit": column.unit, "ucd": column.ucd,
        "utype": column.utype,
    }  # fmt: skip
    if column.ucd.startswith("pos.eq"):
        attributes["ref"] = "ICRS"
    words = " ".join(f"{name}={quoteattr(_clean(text))}" for name, text in attributes.items() if text)
    if not column.description:
        return f"<FIELD {words}/>"
    return f"<FIELD {words}><DESCRIPTION>{escape(_clean(column.description))}</DESCRIPTION></FIELD>"


def footer(rows: Rows, services: Sequence[ServiceDescriptor] = ()) -> str:
    """The end of a document, after the data."""
    word, text = rows.status
    lines = ["</DATA>", "</TABLE>"]
    if word != "OK":
        lines.append(f'<INFO name="QUERY_STATUS" value="{word}">{escape(_clean(text))}</INFO>')
    lines.append("</RESOURCE>")
    for service in services:
        lines += service.lines()
    return "\n".join([*lines, "</VOTABLE>"]) + "\n"


def write_binary2(
    result: Result, write: Write, info: Mapping[str, str], *, version: str = "1.4",
    services: Sequence[ServiceDescriptor] = (),
) -> str:  # fmt: skip
    """The default format: numbers as they are in memory, in base64."""
    rows = Rows(result)
    columns = result.columns
    write(header(columns, info, version, services).encode())
    write(b'<BINARY2><STREAM encoding="base64">\n')
    rest = b""
    for batch in rows:
        content = rest + encode(batch, columns)
        whole = len(content) - len(content) % 3
        rest = content[whole:]
        pieces = [binascii.b2a_base64(content[at : min(at + _LINE, whole)]) for at in range(0, whole, _LINE)]
        write(b"".join(pieces))
    if rest:
        write(binascii.b2a_base64(rest))
    write(b"</STREAM></BINARY2>\n")
    write(footer(rows, services).encode())
    return rows.outcome


def write_tabledata(
    result: Result, write: Write, info: Mapping[str, str], *, version: str = "1.4",
    services: Sequence[ServiceDescriptor] = (),
) -> str:  # fmt: skip
    """Rows as XML, for people and small programs."""
    rows = Rows(result)
    write(header(result.columns, info, version, services).encode())
    write(b"<TABLEDATA>\n")
    for batch in rows:
        write(encode_rows(batch, result.columns))
    write(b"</TABLEDATA>\n")
    write(footer(rows, services).encode())
    return rows.outcome


def error_document(message: str, *, version: str = "1.4", info: Mapping[str, str] | None = None) -> bytes:
    """A document that holds only an error, as DALI wants it."""
    more = "".join(
        f"<INFO name={quoteattr(n)} value={quoteattr(_clean(t))}/>\n" for n, t in (info or {}).items()
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<VOTABLE version="{version}" xmlns="http://www.ivoa.net/xml/VOTable/v1.3">\n'
        '<RESOURCE type="results">\n'
        f'<INFO name="QUERY_STATUS" value="ERROR">{escape(_clean(message))}</INFO>\n{more}'
        "</RESOURCE>\n</VOTABLE>\n"
    ).encode()


def _clean(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(
        c
        for c in text
        if c in "\t\n\r" or (c >= " " and c not in "\ufffe\uffff" and not "\ud800" <= c <= "\udfff")
    )
