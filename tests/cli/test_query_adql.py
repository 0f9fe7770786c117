"""``cumbre query --adql`` on a site: rows, files, and errors that help."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from astropy.io.votable import parse_single_table
from click.testing import CliRunner, Result

from cumbre.cli.query import query
from cumbre.core.configuration import Site
from cumbre.core.errors import UserError
from cumbre.core.time import Clock
from cumbre.site.access import SiteAccess
from cumbre.site.profiles import create_site
from support.pg import fresh_database


@pytest.fixture(scope="module")
def folder(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("site") / "s"
    create_site(root, instrument="democam", seed=1, simulated=True)
    with fresh_database(postgres_dsn) as db:
        path = root / "site.yaml"
        path.write_text(path.read_text().replace("database: embedded ", f"database: '{db.dsn}' "))
        SiteAccess(site=Site.load(root), bus=None, clock=Clock.real(), db=db).close()
        db.execute(
            "INSERT INTO level1.diaobject (diaobjectid, ra, dec, hpx29, validitystartmjdtai, ndiasources)"
            " VALUES (7, 10.5, -20.25, 5, 61000, 1), (8, 11, -21, 6, 61000, 2)"
        )
        yield root


def ask(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(query, ["--site", str(folder), *words], catch_exceptions=False)


def test_rows(folder: Path) -> None:
    shown = ask(folder, "--adql", "SELECT diaObjectId, ra FROM level1.DiaObject ORDER BY ra", "--json")
    assert json.loads(shown.output) == [{"diaObjectId": 7, "ra": 10.5}, {"diaObjectId": 8, "ra": 11.0}]
    assert "diaObjectId" in ask(folder, "--adql", "SELECT * FROM level1.DiaObject").output


def test_the_limit_is_told(folder: Path) -> None:
    shown = ask(folder, "--limit", "1", "--adql", "SELECT diaObjectId FROM level1.DiaObject")
    assert "overflow" in shown.stderr
    assert "--limit" in shown.stderr


def test_a_file_by_its_ending(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.vot"
    shown = ask(folder, "--adql", "SELECT diaObjectId FROM level1.DiaObject", "-o", str(path))
    assert f"{path}: 2 rows" in shown.stderr
    assert sorted(parse_single_table(path).array["diaObjectId"].tolist()) == [7, 8]
    assert [p.name for p in tmp_path.iterdir()] == ["out.vot"]
    with pytest.raises(UserError, match="ending"):
        ask(folder, "--adql", "SELECT 1 FROM level1.DiaObject", "-o", str(tmp_path / "out.xls"))


def test_errors_name_the_place(folder: Path) -> None:
    with pytest.raises(UserError, match=r"line 1, column 8.*diaObjectId"):
        ask(folder, "--adql", "SELECT diaObjectid2 FROM level1.DiaObject")
    with pytest.raises(UserError, match="either"):
        ask(folder)


def test_tap_schema_is_there(folder: Path) -> None:
    shown = ask(folder, "--adql", "SELECT table_name FROM tap_schema.tables", "--json")
    assert "ivoa.obscore" in {row["table_name"] for row in json.loads(shown.output)}
