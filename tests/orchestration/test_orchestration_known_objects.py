"""A simulated night's asteroids: those of the site's catalogue are attributed, the others stay candidates."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

from cumbre.cli.orbits import orbits
from cumbre.core.configuration import SITE_FILE, Site
from cumbre.core.geometry import separation_deg
from cumbre.orchestration import prompt_worker
from cumbre.payloads.solar_system.orbits import object_id
from support.prompt_world import CAMERA, DETECTOR, NIGHT, make_payload, make_template

SEED_PART = 0.6


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    from cumbre.simulator.preparation import prepare_sky
    from cumbre.site.profiles import create_site

    root = tmp_path_factory.mktemp("moving") / "site"
    create_site(root)
    path = root / SITE_FILE
    text = path.read_text().replace("tiles: 3", "tiles: 1")
    path.write_text(text.replace("  seed:", "  asteroids_per_deg2: 1500\n  seed:", 1))
    made = Site.load(root)
    assert made.config.simulator.asteroids_per_deg2 == 1500
    prepare_sky(made)
    make_template(made)
    return made


def test_known_asteroids_are_attributed_and_unknown_ones_are_not(site, database):
    from cumbre.simulator.exposure import ExposureRequest
    from cumbre.simulator.orbit_file import designations, known_rows, write_orbit_file
    from cumbre.simulator.sky import Sky
    from cumbre.simulator.truth import detector_truth

    sky = Sky.load(site.root / "simulator")
    asteroids = sky.tables["asteroids"]
    file = site.root / "known.dat"
    n = write_orbit_file(file, asteroids, part=SEED_PART, seed=5)
    assert 0.5 < n / len(asteroids["id"]) < 0.7
    (site.root / "run").mkdir(exist_ok=True)
    (site.root / "run" / "postgres.dsn").write_text(database.dsn)
    result = CliRunner().invoke(orbits, ["load", str(file), "--site", str(site.root)])
    assert f"{n} orbits" in result.output, result
    for cached in (prompt_worker._level1, prompt_worker._known_objects):
        cached.cache_clear()
    prompt_worker._prepared.clear()
    payload = make_payload(site, database.dsn)
    prompt_worker.preload(payload)
    done = prompt_worker.process(payload)
    assert done["n_sources"] > 0
    # the answer book, which only this test reads
    tile = sky.tiles[0]
    request = ExposureRequest(
        obs_id="XC_O_20261120_000001", image_type="OBJECT", exposure_s=30.0, filter="r_demo", ra=tile.ra, dec=tile.dec,
        rotpa=0.0, begin_tai=NIGHT + 60, group_id="",
    )  # fmt: skip
    truth = detector_truth(CAMERA, DETECTOR, request, sky, 1)
    moving = (truth["kind"] == "asteroid") & truth["usable"] & (truth["snr"] > 15)
    first = int(asteroids["id"][0])
    known = set(known_rows(len(asteroids["id"]), SEED_PART, 5).tolist())
    rows = database.query(
        'SELECT s.diasourceid, s.ra, s."dec", s.ssobjectid, s.diaobjectid, s.reliability, e.ephoffset, e.designation'
        " FROM level1.diasource s LEFT JOIN level1.sssource e USING (diasourceid) WHERE NOT s.isnegative"
    )
    ra, dec = (np.array([row[name] for row in rows]) for name in ("ra", "dec"))
    counts = {"attributed": 0, "candidates": 0}
    for k in np.flatnonzero(moving).tolist():
        distance = 3600 * separation_deg(truth["ra"][k], truth["dec"][k], ra, dec)
        at = int(np.argmin(distance))
        if distance[at] > 0.7:
            continue  # blended or not found: another measure's business
        row, number = rows[at], int(truth["id"][k]) - first
        if number in known:
            packed, name = designations(number)
            assert row["ssobjectid"] == object_id(packed)
            assert row["designation"] == name
            assert row["diaobjectid"] is None
            assert row["ephoffset"] < 0.8
            counts["attributed"] += 1
        else:
            assert row["ssobjectid"] is None
            counts["candidates"] += row["diaobjectid"] is not None
    assert counts["attributed"] >= 4
    assert counts["candidates"] >= 2
    assert counts["attributed"] + counts["candidates"] > 0.7 * moving.sum()
    offsets = [
        row["ephoffset"] for row in rows if row["ssobjectid"] is not None and (row["reliability"] or 0) > 0.5
    ]
    assert np.median(offsets) < 0.25
    # and none that the catalogue does not have
    catalogue = {object_id(designations(number)[0]) for number in known}
    assert {row["ssobjectid"] for row in rows if row["ssobjectid"]} <= catalogue


def test_designations_are_the_centers():
    from cumbre.simulator.orbit_file import designations

    assert designations(0) == ("K26A00A", "2026 AA")
    assert designations(24) == ("K26A00Z", "2026 AZ")
    assert designations(25) == ("K26A01A", "2026 AA1")
    assert designations(25 * 107) == ("K26AA7A", "2026 AA107")  # packed as in the Center's own example
    assert designations(620 * 25) == ("K26B00A", "2026 BA")
    many = [designations(i)[0] for i in range(40000)]
    assert len(set(many)) == 40000
    assert {len(text) for text in many} == {7}
