"""Which documents there are, what they are called, and the one function that writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cumbre.core.errors import UserError

if TYPE_CHECKING:
    from cumbre.access.query import Result
    from cumbre.access.results.services import ServiceDescriptor

type Write = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of document.

    Attributes
    ----------
    name
        Its key: votable, votable-tabledata, parquet, fits, csv, tsv, json.
    media_type, extension
        Content-Type of the answer and ending of a file.
    aliases
        What RESPONSEFORMAT may call it, lower case, without blanks.
    standard_id
        IVOA identifier of the output format (TAPRegExt), empty when there is none.
    """

    name: str
    media_type: str
    extension: str
    aliases: tuple[str, ...]
    standard_id: str = ""


_TAP = "ivo://ivoa.net/std/TAPRegExt#output-votable-"
FORMATS: tuple[Format, ...] = (
    Format(
        "votable", "application/x-votable+xml", "vot",
        ("votable", "votable/b2", "votable/binary2", "application/x-votable+xml", "text/xml", "application/xml",
         "application/x-votable+xml;serialization=binary2"),
        _TAP + "binary2",
    ),
    Format(
        "votable-tabledata", "application/x-votable+xml;serialization=TABLEDATA", "vot",
        ("votable/td", "votable-tabledata", "application/x-votable+xml;serialization=tabledata"),
        _TAP + "td",
    ),
    Format(
        "parquet", "application/vnd.apache.parquet", "parquet",
        ("parquet", "votable+parquet", "application/vnd.apache.parquet", "application/x-parquet"),
    ),
    Format("fits", "application/fits", "fits", ("fits", "application/fits", "application/x-fits")),
    Format("csv", "text/csv;header=present", "csv", ("csv", "text/csv", "text/csv;header=present")),
    Format("tsv", "text/tab-separated-values", "tsv", ("tsv", "text/tab-separated-values")),
    Format("json", "application/json", "json", ("json", "application/json")),
)  # fmt: skip
"""The first is the default."""


def find_format(wanted: str | None) -> Format:
    """Format of a RESPONSEFORMAT; the default for None.

    Raises
    ------
    UserError
        There is no such format; lists them.
    """
    if not wanted:
        return FORMATS[0]
    key = "".join(wanted.lower().split())
    for item in FORMATS:
        if key == item.name or key in item.aliases:
            return item
    names = ", ".join(item.name for item in FORMATS)
    raise UserError(f"RESPONSEFORMAT {wanted}: expected one of {names}, or their media types")


def write(
    result: Result, form: str | Format, write_bytes: Write, *, info: Mapping[str, str] | None = None,
    votable_version: str = "1.4", services: Sequence[ServiceDescriptor] = (),
) -> str:  # fmt: skip
    """Write a whole result as a document, a piece at a time.

    Parameters
    ----------
    result
        The query; its rows are consumed and it is closed.
    form
        A format, or its name.
    write_bytes
        Called with each piece.
    info
        More INFO elements or metadata (name → value): query, user, provenance.
    votable_version
        ``1.4`` or ``1.5``.
    services
        What can be asked next with the rows, told in VOTables.

    Returns
    -------
    str
        ``"OK"``, ``"OVERFLOW: which limit"``, or ``"ERROR: what"`` when the query failed after the document
        had begun: the document is whole and says so. The cause of an error is not raised again.

    Raises
    ------
    UserError
        No such format. Nothing was written.
    """
    from cumbre.access.results import fits, parquet, text, votable

    chosen = find_format(form) if isinstance(form, str) else form
    more = dict(info or {})
    if chosen.name == "votable":
        return votable.write_binary2(result, write_bytes, more, version=votable_version, services=services)
    if chosen.name == "votable-tabledata":
        return votable.write_tabledata(result, write_bytes, more, version=votable_version, services=services)
    if chosen.name == "parquet":
        return parquet.write(result, write_bytes, more)
    if chosen.name == "fits":
        return fits.write(result, write_bytes, more)
    if chosen.name == "json":
        return text.write_json(result, write_bytes, more)
    return text.write_separated(result, write_bytes, "," if chosen.name == "csv" else "\t")
