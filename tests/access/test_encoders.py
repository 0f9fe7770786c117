"""Documents read back by astropy and pyarrow are the arrays that went in."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumbre.access.engines import Engines
from cumbre.access.limits import Limits, QueryTimeoutError, Watch
from cumbre.access.query import Result, run
from cumbre.access.results import FORMATS, find_format, write
from cumbre.access.results.types import arrow_schema
from cumbre.access.tables import Column, Tables
from cumbre.access.uploads import upload_table
from cumbre.core.errors import UserError

COLUMNS = (
    Column("id", "long", unit="", ucd="meta.id", description='Number <1> & "more"'),
    Column("short", "short"),
    Column("byte", "unsignedByte"),
    Column("whole", "int"),
    Column("mag", "float", unit="mag"),
    Column("ra", "double", unit="deg", ucd="pos.eq.ra"),
    Column("good", "boolean"),
    Column("plain", "char", "*"),
    Column("name", "unicodeChar", "*"),
    Column("place", "double", "2", "point", unit="deg"),
    Column("outline", "double", "*", "polygon"),
    Column("counts", "int", "*"),
)
ROWS: dict[str, list[Any]] = {
    "id": [1, -(1 << 62), 3, None],
    "short": [1, -32767, None, 5],
    "byte": [0, 255, 7, None],
    "whole": [None, -(1 << 31) + 1, 1 << 30, 0],
    "mag": [1.5, None, float("nan"), -0.25],
    "ra": [0.1, 1 / 3, None, 359.999999999],
    "good": [True, False, None, True],
    "plain": ["", "a,b", None, "quote \" <tag> & 'x'"],
    "name": ["né", None, "", "日本 Ωmega"],
    "place": [[1.0, 2.0], None, [0.1, -0.2], [3.0, 4.0]],
    "outline": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [], None, [0.5] * 8],
    "counts": [[1, 2], [3], None, []],
}
SCHEMA = arrow_schema(COLUMNS)


def table(rows: dict[str, list[Any]] | None = None) -> pa.Table:
    return pa.table({f.name: pa.array((rows or ROWS)[f.name], type=f.type) for f in SCHEMA}).cast(SCHEMA)


def result(batches: Iterator[pa.RecordBatch] | list[pa.RecordBatch], maxrec: int = 1000) -> Result:
    stream = iter(batches)
    return Result(
        COLUMNS, SCHEMA, stream, watch=Watch(Limits()), max_rows=maxrec, row_limit=f"MAXREC: {maxrec} rows",
        stop=lambda: None, close=lambda: None,
    )  # fmt: skip


def document(name: str, batches: Any = None, **more: Any) -> tuple[bytes, str]:
    out = io.BytesIO()
    rows = table().to_batches(max_chunksize=3) if batches is None else batches
    outcome = write(result(rows, **more), name, out.write, info={"QUERY": "SELECT <x> & 'y'"})
    return out.getvalue(), outcome


def votable(content: bytes) -> Any:
    from astropy.io.votable import parse
    from astropy.io.votable.exceptions import VOWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # a trailing INFO is right since VOTable 1.2; an unknown unit is ours to say
        warnings.simplefilter("ignore", VOWarning) if b"ERROR" in content else None
        return parse(io.BytesIO(content))


def as_lists(array: Any) -> dict[str, list[Any]]:
    """Masked values as None, everything else as Python's."""
    out: dict[str, list[Any]] = {}
    for name in array.dtype.names:
        values, mask = array[name].data, array[name].mask
        column = []
        for value, gone in zip(values, mask, strict=True):
            if isinstance(value, np.ndarray | np.ma.MaskedArray):
                column.append(None if np.all(gone) and np.size(gone) else np.asarray(value).tolist())
            elif np.all(gone):
                column.append(None)
            else:
                column.append(value.item() if hasattr(value, "item") else value)
        out[name] = column
    return out


def same(got: Any, want: Any) -> bool:
    if isinstance(want, list):
        return got is not None and len(got) == len(want) and all(map(same, got, want))
    if isinstance(want, float) and math.isnan(want):
        return got is None or math.isnan(got)
    return got == want


@pytest.mark.parametrize("name", ["votable", "votable-tabledata"])
def test_votable_read_by_astropy(name: str) -> None:
    content, outcome = document(name)
    assert outcome == "OK"
    tree = votable(content)
    found = tree.get_first_table()
    assert [(f.name, f.unit and str(f.unit), f.ucd) for f in found.fields][5] == ("ra", "deg", "pos.eq.ra")
    assert found.fields[0].description == 'Number <1> & "more"'
    assert [f.datatype for f in found.fields] == [c.datatype for c in COLUMNS]
    assert {i.name: i.value for i in tree.resources[0].infos} == {
        "QUERY_STATUS": "OK",
        "QUERY": "SELECT <x> & 'y'",
    }
    got = as_lists(found.array)
    for column, (key, want) in zip(COLUMNS, ROWS.items(), strict=True):
        for have, wanted in zip(got[key], want, strict=True):
            if wanted is None and (column.arraysize or name == "votable-tabledata"):
                assert have in (None, "", [], [None, None]) or np.isnan(have).all(), key
            else:
                assert same(have, wanted), (key, have, wanted)


def test_parquet_with_votable_inside() -> None:
    content, outcome = document("parquet")
    assert outcome == "OK"
    assert pq.read_table(io.BytesIO(content)).cast(SCHEMA).to_pydict().keys() == ROWS.keys()
    for key, want in table().to_pydict().items():
        assert all(map(same, pq.read_table(io.BytesIO(content)).column(key).to_pylist(), want)), key
    words = pq.read_metadata(io.BytesIO(content)).metadata
    assert words[b"QUERY_STATUS"] == b"OK"
    from astropy.io.votable import parse

    fields = parse(io.BytesIO(words[b"IVOA.VOTable-Parquet.content"])).get_first_table().fields
    assert [(f.name, f.datatype) for f in fields] == [(c.name, c.datatype) for c in COLUMNS]


def test_fits_read_by_astropy() -> None:
    from astropy.io import fits

    content, outcome = document("fits")
    assert outcome == "OK"
    assert len(content) % 2880 == 0
    with fits.open(io.BytesIO(content), logical_as_bytes=True, character_as_bytes=False) as file:
        file.verify("exception")
        data, header = file[1].data, file[1].header
        assert header["TUNIT6"] == "deg"
        assert header["QSTATUS"] == "OK"
        for column, (key, want) in zip(COLUMNS, ROWS.items(), strict=True):
            for have, wanted in zip(data.field(key), want, strict=True):
                if column.datatype == "boolean":
                    assert (
                        bytes(have) == {True: b"T", False: b"F", None: b""}[wanted]
                    )  # numpy drops zero bytes
                elif wanted is None:
                    empty = have in ("", b"") if column.datatype.endswith("har") else True
                    assert empty
                elif column.datatype in ("char", "unicodeChar"):
                    plain = have.decode() if isinstance(have, bytes) else have
                    assert plain == wanted or not wanted.isascii()
                elif column.arraysize:
                    assert list(have[: len(wanted)]) == wanted
                else:
                    assert same(have.item(), wanted), key
        null = header[f"TNULL{1}"]
        assert file[1].data.field("id")[3] == null


@pytest.mark.parametrize(("name", "mark"), [("csv", ","), ("tsv", "\t")])
def test_text_read_by_python(name: str, mark: str) -> None:
    content, outcome = document(name)
    assert outcome == "OK"
    rows = list(csv.reader(io.StringIO(content.decode(), newline=""), delimiter=mark,
                           quoting=csv.QUOTE_NONE if name == "tsv" else csv.QUOTE_MINIMAL))  # fmt: skip
    assert rows[0] == [c.name for c in COLUMNS]
    assert [row[0] for row in rows[1:]] == ["1", str(-(1 << 62)), "3", ""]
    assert [float(row[5]) for row in rows[1:] if row[5]] == [v for v in ROWS["ra"] if v is not None]
    assert [row[8] for row in rows[1:]] == ["né", "", "", "日本 Ωmega"]
    assert rows[4][7] == ROWS["plain"][3]
    assert rows[1][9] == "1.0 2.0"
    assert [row[6] for row in rows[1:]] == ["true", "false", "", "true"]
    if name == "csv":  # null and the empty string differ
        lines = content.decode().split("\r\n")
        assert ',"",né,' in lines[1]


def test_json_read_by_python() -> None:
    content, outcome = document("json")
    assert outcome == "OK"
    found = json.loads(content)
    assert [c["name"] for c in found["metadata"]] == [c.name for c in COLUMNS]
    assert (found["status"], found["rows"]) == ("OK", 4)
    for i, (key, want) in enumerate(ROWS.items()):
        for row, wanted in zip(found["data"], want, strict=True):
            nan = isinstance(wanted, float) and math.isnan(wanted)
            assert row[i] is None if nan else row[i] == wanted, key


def broken(after: int = 1) -> Iterator[pa.RecordBatch]:
    batches = table().to_batches(max_chunksize=2)
    yield from batches[:after]
    raise QueryTimeoutError("the query took longer than its limit of 1 s <&>")


@pytest.mark.parametrize("form", [f.name for f in FORMATS])
def test_an_error_in_the_middle_ends_the_document_well(form: str) -> None:
    content, outcome = document(form, broken())
    assert outcome.startswith("ERROR: after 2 rows: the query took longer")
    if form.startswith("votable"):
        last = votable(content).resources[0].tables[0].infos or votable(content).resources[0].infos
        assert [i.value for i in last][-1] == "ERROR"
        assert len(votable(content).get_first_table().array) == 2
    elif form == "parquet":
        assert pq.read_table(io.BytesIO(content)).num_rows == 2
        assert pq.read_metadata(io.BytesIO(content)).metadata[b"QUERY_STATUS"] == b"ERROR"
    elif form == "fits":
        from astropy.io import fits

        with fits.open(io.BytesIO(content)) as file:
            assert len(file[1].data) == 2
            assert file[1].header["QSTATUS"] == "ERROR"
            assert "longer than its limit" in "".join(file[1].header["HISTORY"])
    elif form == "json":
        assert json.loads(content)["status"] == "ERROR"
        assert len(json.loads(content)["data"]) == 2
    else:
        assert content.decode().splitlines()[-1].startswith("# ERROR: after 2 rows")


@pytest.mark.parametrize("form", [f.name for f in FORMATS])
def test_an_error_before_the_first_row_is_raised(form: str) -> None:
    out = io.BytesIO()
    with pytest.raises(QueryTimeoutError):
        write(result(broken(0)), form, out.write)
    assert out.getvalue() == b""


@pytest.mark.parametrize("form", [f.name for f in FORMATS])
def test_what_was_cut_says_so(form: str) -> None:
    content, outcome = document(form, maxrec=3)
    assert outcome == "OVERFLOW: MAXREC: 3 rows"
    text = content.decode("latin-1")
    assert "OVERFLOW" in text
    assert "MAXREC: 3 rows" in text


@pytest.mark.parametrize("form", [f.name for f in FORMATS])
def test_an_empty_result_is_a_document(form: str) -> None:
    content, outcome = document(form, [])
    assert outcome == "OK"
    if form.startswith("votable"):
        assert len(votable(content).get_first_table().array) == 0
    elif form == "parquet":
        assert pq.read_table(io.BytesIO(content)).num_rows == 0
    elif form == "fits":
        from astropy.io import fits

        with fits.open(io.BytesIO(content)) as file:
            assert len(file[1].data) == 0
    elif form == "json":
        assert json.loads(content)["data"] == []
    else:
        assert len(content.decode().splitlines()) == 1


@given(
    st.lists(
        st.tuples(
            st.none() | st.integers(-(2**63), 2**63 - 1), st.none() | st.floats(width=64),
            st.none() | st.floats(width=32), st.none() | st.booleans(),
            st.none() | st.text(st.characters(min_codepoint=32, max_codepoint=0xD7FF), max_size=9),
            st.none() | st.lists(st.floats(allow_nan=False, width=64), max_size=4),
        ),
        min_size=1, max_size=20,
    )
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_values_survive_binary2(rows: list[tuple[Any, ...]]) -> None:
    columns = (
        Column("i", "long"), Column("d", "double"), Column("f", "float"), Column("b", "boolean"),
        Column("s", "unicodeChar", "*"), Column("a", "double", "*"),
    )  # fmt: skip
    schema = arrow_schema(columns)
    data = pa.table(
        [
            pa.array(list(values), type=f.type)
            for values, f in zip(zip(*rows, strict=True), schema, strict=True)
        ],
        schema=schema,
    )
    made = Result(columns, schema, iter(data.to_batches(max_chunksize=7)), watch=Watch(Limits()), max_rows=99,
                  row_limit="", stop=lambda: None, close=lambda: None)  # fmt: skip
    out = io.BytesIO()
    assert write(made, "votable", out.write) == "OK"
    got = as_lists(votable(out.getvalue()).get_first_table().array)
    for key, column in zip("idfbsa", zip(*rows, strict=True), strict=True):
        for have, want in zip(got[key], column, strict=True):
            if want is None:
                assert have in (None, "", []) or math.isnan(have)
            else:
                assert same(have, want), key


def test_a_whole_query_as_a_document() -> None:
    tables = Tables([upload_table("numbers", pa.table({"n": range(200_000), "t": ["x"] * 200_000}))])
    pieces: list[int] = []
    made = run("SELECT n, t, n * 2 AS m FROM numbers", tables=tables, engines=Engines())
    assert write(made, "votable", lambda piece: pieces.append(len(piece))) == "OK"
    assert len(pieces) > 4  # not one big piece
    assert max(pieces) < 8_000_000


def test_formats_by_their_names() -> None:
    assert find_format(None).name == "votable"
    assert find_format("application/x-votable+xml; serialization=TABLEDATA").name == "votable-tabledata"
    assert find_format("text/csv").name == "csv"
    with pytest.raises(UserError, match="votable"):
        find_format("xls")
