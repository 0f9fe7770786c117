"""A new object is measured on an image of the night before, once, whatever ends in between."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from click.testing import CliRunner

from cumbre.cli.precover import precover
from cumbre.core.ids import ObsId
from cumbre.core.time import Clock
from cumbre.ledger.schema import STEPS
from cumbre.orchestration import prompt_worker
from cumbre.orchestration.precovery import MAX_ATTEMPTS, Precovery
from cumbre.orchestration.prompt_state import DetectorImage
from cumbre.stores.migrations import migrate
from support.prompt_world import CAMERA, DETECTOR, GROUP, NIGHT, frame, make_payload, make_site, make_template

BEFORE = "XC_O_20261119_000001"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = make_site(tmp_path_factory.mktemp("precovery") / "site")
    make_template(made)
    return made


def an_earlier_image(payload: dict, site, obs_id: str, begin_tai: float) -> dict:
    path, _ = frame(site, obs_id, begin_tai)
    exposure_id = ObsId.parse(obs_id).exposure_id
    image = DetectorImage(
        obs_id, CAMERA.name, exposure_id, GROUP, 0, DETECTOR.name, str(path), begin_tai + 35
    )
    return payload | {"image": asdict(image), "visit": None}


def record(database, payload: dict, begin_tai: float) -> None:
    image = payload["image"]
    database.execute(
        "INSERT INTO ledger.image (obs_id, exposure_id, begin_tai) VALUES (%s, %s, %s)",
        (image["obs_id"], image["exposure_id"], begin_tai),
    )
    database.execute(
        "INSERT INTO ledger.hop (obs_id, detector, hop, outcome, path, hop_tai, recv_tai)"
        " VALUES (%s, 0, 'at_archive', 'ok', %s, 0, 0)",
        (image["obs_id"], image["path"]),
    )


def test_new_objects_are_measured_on_the_images_before(site, database):
    for cached in (prompt_worker._level1, prompt_worker._known_objects):
        cached.cache_clear()
    migrate(database, "ledger", STEPS)
    now = make_payload(site, database.dsn)
    before = an_earlier_image(now, site, BEFORE, NIGHT - 86164.0905)
    for payload, begin in ((before, NIGHT - 86164.0905), (now, NIGHT + 60)):
        record(database, payload, begin)
        prompt_worker.process(payload)
    visit_before, visit_now = (payload["image"]["exposure_id"] for payload in (before, now))
    new = [
        row[0]
        for row in database.execute(
            "SELECT dia_object_id FROM level1.precovery WHERE visit = %s", (visit_now,)
        )
    ]
    assert new  # the planted star at least
    rows = "SELECT count(*) FROM level1.diaforcedsource WHERE diaobjectid = ANY(%s) AND visit = %s"
    assert database.execute(rows, (new, visit_before)) == [(0,)]
    earlier = database.execute(
        "SELECT diaforcedsourceid FROM level1.diaforcedsource WHERE visit = %s", (visit_before,)
    )
    clock = Clock(NIGHT + 3600, 0.0, rate=1e-12)

    # the raw file is away: nothing is lost, the objects wait
    file = site.root / "raws" / f"{BEFORE}_{DETECTOR.name}.fits"
    file.rename(file.with_suffix(".away"))
    done = Precovery(site.root, database, clock).run()
    assert done["again"] == len(new)
    assert done["forced"] == 0
    file.with_suffix(".away").rename(file)

    (site.root / "run").mkdir(exist_ok=True)
    (site.root / "run" / "postgres.dsn").write_text(database.dsn)
    result = CliRunner().invoke(precover, ["--site", str(site.root)])
    assert f"{len(new)} objects done, 0 to be tried again; 1 images" in result.output, result
    forced = database.query(
        "SELECT diaobjectid, psffluxerr, psfflux, diaforcedsourceid, midpointmjdtai FROM level1.diaforcedsource"
        " WHERE diaobjectid = ANY(%s) AND visit = %s",
        (new, visit_before),
    )
    assert len(forced) == len(new)
    assert not {row["diaforcedsourceid"] for row in forced} & {row[0] for row in earlier}
    source = database.query(
        "SELECT diaobjectid, psfflux, x, y FROM level1.diasource WHERE visit = %s ORDER BY snr DESC",
        (visit_now,),
    )[0]
    star = next(row for row in forced if row["diaobjectid"] == source["diaobjectid"])
    assert abs(star["psfflux"]) < 5 * star["psffluxerr"]  # it was not there
    assert star["psffluxerr"] < 0.05 * source["psfflux"]
    assert star["midpointmjdtai"] == pytest.approx((NIGHT - 86164.0905 + 15) / 86400 + 40587, abs=1e-4)
    queue = database.query(
        "SELECT n_images, n_forced, attempts, done_tai FROM level1.precovery WHERE visit = %s", (visit_now,)
    )
    assert {(row["n_images"], row["n_forced"], row["attempts"]) for row in queue} == {(1, 1, 2)}
    assert all(row["done_tai"] for row in queue)

    # no time at all: nothing is begun, nothing is said to be done
    database.execute("UPDATE level1.precovery SET done_tai = NULL WHERE visit = %s", (visit_now,))
    hurried = Precovery(site.root, database, clock).run(budget_s=0.0)
    assert hurried["unfinished"] == len(new)
    assert hurried["objects"] + hurried["images"] == 0
    assert database.execute("SELECT count(*) FROM level1.precovery WHERE done_tai IS NULL") == [(len(new),)]

    # once more, as after a run that was killed before it could say that it was done
    database.execute("UPDATE level1.precovery SET done_tai = NULL")

    def not_again(*_):
        raise AssertionError("measured already")

    again = Precovery(site.root, database, clock, remake=not_again).run()
    assert again["forced"] == 0
    assert again["again"] == 0

    # beyond the days asked for nothing is looked at; what fails for good is given up
    database.execute("UPDATE level1.precovery SET done_tai = NULL, attempts = %s", (MAX_ATTEMPTS - 1,))
    database.execute("DELETE FROM level1.diaforcedsource WHERE visit = %s", (visit_before,))
    database.execute("DELETE FROM level1.precovery_image")
    assert Precovery(site.root, database, clock, days=0.5).run()["images"] == 0
    database.execute("UPDATE level1.precovery SET done_tai = NULL, attempts = %s", (MAX_ATTEMPTS - 1,))
    file.unlink()
    given_up = Precovery(site.root, database, clock).run()
    assert given_up["again"] == 0
    messages = database.execute(
        "SELECT DISTINCT message FROM level1.precovery WHERE visit = %s", (visit_now,)
    )
    assert "not in the archive's cache" in messages[0][0]
