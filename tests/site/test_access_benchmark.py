"""The benchmark of data access runs, every figure is there, and its data are made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cumbre.cli.benchmark import benchmark
from cumbre.site.access_benchmark import running
from cumbre.site.access_catalogue import server_of
from cumbre.site.access_peer import Peer
from cumbre.stores.postgres import Database

ROWS = 20_000


def run(work: Path) -> dict[str, dict[str, float]]:
    command = [
        "access",
        "--rows",
        str(ROWS),
        "--work",
        str(work),
        "--clients",
        "12",
        "--big",
        "2",
        "--seconds",
        "6",
        "--json",
    ]
    answer = CliRunner().invoke(benchmark, command)
    assert answer.exit_code == 0, (answer.output, answer.exception)
    return json.loads(answer.stdout)


def test_every_figure_is_there_and_the_data_are_made_once(tmp_path: Path) -> None:
    figures = run(tmp_path)
    made = {
        path.name: path.stat().st_mtime_ns
        for path in tmp_path.glob("*.*")
        if path.suffix in (".parquet", ".fits")
    }
    assert set(made) == {f"object-{ROWS}.parquet", "MC_O_20261116_000001.fits"}
    assert {"cone 0.1 deg, pg", "BINARY2 from PostgreSQL", "BINARY2 from Parquet", "scan and aggregate", "match 50k, files",
            "match 50k, pg", "async count", "cutout 200x200", "outlines of 2,000", "crowd"} <= set(figures)  # fmt: skip
    # what the bare engines say too: one row in BINARY2 has 79 bytes, four thirds of them in base64
    for name in ("BINARY2 from PostgreSQL", "BINARY2 from Parquet"):
        assert 105 < figures[name]["bytes_per_row"] < 107
    crowd = figures["crowd"]
    assert crowd["failures"] == 0, crowd["reasons"]
    assert crowd["small"] > 0
    assert crowd["big"] > 0
    server = server_of(tmp_path, ROWS)
    db = Database(server.start())
    db.execute("TRUNCATE cat.object")  # as PostgreSQL does when it was killed
    db.close()
    server.stop()
    with running(tmp_path, ROWS, ROWS // 10) as bench:
        peer = Peer(f"{bench.url}/tap", ROWS, "pg.object")
        told = {name: step() for name, step in peer.steps(bench.positions(100), 2 / 3600).items()}
        assert len(told) == 6
        assert not [value for value in told.values() if "failed" in value]
        peer.table = "pg.elsewhere"
        assert "no table" in peer.steps(bench.positions(5), 1)["peer: scan and aggregate"]()["failed"]
        assert told["peer: BINARY2"]["bytes_per_row"] == pytest.approx(106, abs=1)
        with pytest.raises(RuntimeError, match=f"has {ROWS} rows, expected the 5"):
            Peer(bench.url, 5, "pg.object")
        assert b"20000" in bench.ask("SELECT count(*) FROM files.object", RESPONSEFORMAT="csv")["start"]
    assert all((tmp_path / name).stat().st_mtime_ns == at for name, at in made.items())
