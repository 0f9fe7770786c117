"""The IVOA's and GAVO's ADQL queries: valid ones are accepted, wrong ones refused, nothing breaks."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pytest

from cumbre.access.adql.errors import AdqlError
from cumbre.access.adql.parser import parse
from cumbre.access.engines import Engines
from cumbre.access.query import run
from cumbre.access.tables import Table, Tables
from cumbre.access.uploads import upload_table
from cumbre.core.errors import UserError

CORPUS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "vo" / "adql_lyonetia"
pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason="needs the ADQL corpus in ../shared/data/vo")

NOT_DECLARED = ("ivo_foo(", "ivo_getstring(")
"""Functions that this service does not declare."""
CONTRADICTED = "SELECT * FROM t1 INNER JOIN t2"
"""Wrong for the IVOA's set, while GAVO's has ``select x from t1 JOIN t2`` and others as valid: the grammar of
ADQL 2.1 makes the condition optional. The parser takes it; the next step refuses it with a remedy."""


def queries() -> list[tuple[str, bool, str]]:
    found = []
    for path in sorted(CORPUS.glob("*/*.xml")):
        for node in ElementTree.parse(path).getroot().iter("query"):
            adql = node.find("adql")
            found.append((f"{path.parent.name}/{path.stem}", adql.get("valid") == "true", adql.text))
    return found


def test_valid_flag_of_every_query() -> None:
    wrong, checked, placed, refused = [], 0, 0, 0
    for where, valid, text in queries():
        if any(name in text for name in NOT_DECLARED) or " ".join(text.split()) == CONTRADICTED:
            continue
        checked += 1
        try:
            parse(text)
        except AdqlError as error:
            if valid:
                wrong.append(f"{where}: refused: {text.strip()}: {error}")
            else:
                refused += 1
                placed += error.line >= 1 and error.column >= 1
        else:
            if not valid:
                wrong.append(f"{where}: accepted: {text.strip()}")
    assert not wrong, "\n".join(wrong)
    assert checked == 374 - 4
    assert placed == refused


NAMES = [
    "a",
    "abc",
    "adql",
    "alldata",
    "alpha",
    "alphafloat",
    "alllower",
    "amanda",
    "anything",
    "atable",
    "b",
    "band",
    "c",
    "crazy",
    "data",
    "dec",
    "dec2000",
    "dej2000",
    "deltafloat",
    "dist",
    "else3",
    "foo",
    "h",
    "height",
    "id",
    "inching",
    "k",
    "long",
    "m",
    "mag",
    "mass",
    "mine",
    "misc",
    "most",
    "mystars",
    "name",
    "oid",
    "p",
    "pm_ra",
    "pm_dec",
    "q",
    "quoted",
    "r",
    "ra",
    "ra1",
    "ra2",
    "ra2000",
    "raj2000",
    "rv",
    "s",
    "spatial",
    "spatial2",
    "speed",
    "star_name",
    "stars",
    "t",
    "t1",
    "t2",
    "t3",
    "t4",
    "table1",
    "table2",
    "table3",
    "type",
    "u",
    "v",
    "version",
    "w",
    "width",
    "wot",
    "x",
    "y",
    "z",
]


def tables() -> Tables:
    """Tables of the names that the queries use, with columns of the names that they use: most of them can run."""
    texts = {"name", "type", "version", "star_name", "k"}
    rows = pa.table({n: pa.array(["a", "b"]) if n in texts else pa.array([1.0, 2.5]) for n in NAMES})
    made = [upload_table(n, rows) for n in NAMES if n not in {"id", "dec"}]
    return Tables([Table("main", t.name, t.columns, engine="arrow", source=t.source, rows=2) for t in made])


def test_no_query_breaks_the_service() -> None:
    """Every query either runs or is refused as the asker's error; none is a fault of ours."""
    sky, engines = tables(), Engines()
    ran = 0
    for _, _, text in queries():
        try:
            run(text, tables=sky, engines=engines, maxrec=5).read_all()
        except UserError:
            continue
        ran += 1
    assert ran > 60
