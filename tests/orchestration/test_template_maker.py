"""Templates of archived visits: from raw files of the simulated camera to the one that prompt processing takes."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from cumbre.bus import open_bus
from cumbre.cli.template import template
from cumbre.core.configuration import SITE_FILE, Templates
from cumbre.core.errors import NotFoundError, UserError
from cumbre.core.ids import ObsId
from cumbre.core.time import Clock
from cumbre.ledger import schema
from cumbre.orchestration import templates
from cumbre.orchestration.inputs import Field, InputLoader, airmass_at
from cumbre.orchestration.template_maker import TemplateMaker
from cumbre.orchestration.templates import TemplateStore
from cumbre.payloads.exposure_file import load_exposure
from support.prompt_world import CAMERA, DETECTOR, NIGHT, frame, make_site, make_template

SIDEREAL_S = 86164.0905
RULES = Templates(fewest_visits=2, airmass_edges=[1.0, 2.9])
VISITS = [(f"XC_O_202611{20 + k}_000001", NIGHT + k * SIDEREAL_S) for k in range(3)]


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """A site with a template from elsewhere, calibrations, and three visits of one field with the same airmass."""
    site = make_site(tmp_path_factory.mktemp("templates") / "site")
    make_template(site)
    files = {}
    for obs_id, begin in VISITS:
        files[obs_id], tile = frame(site, obs_id, begin)
    (site.root / "survey.json").write_text(json.dumps([{"name": "T", "ra": tile.ra, "dec": tile.dec}]))
    return site, files, tile


@pytest.fixture
def world(taken, database):
    site, files, tile = taken
    folder = site.root / "archive" / "templates"
    before = (folder / "index.json").read_bytes()
    schema.prepare(database)
    yield site, files, tile, database
    for name in ("resampled", "measured"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in folder.glob("T/*_x*"):
        path.unlink()
    (folder / "index.json").write_bytes(before)


def archive(world, *obs_ids, image_type="OBJECT"):
    """Tell the ledger that visits are at the archive."""
    _, files, tile, database = world
    for obs_id in obs_ids:
        begin = dict(VISITS)[obs_id]
        database.execute(
            "INSERT INTO ledger.image (obs_id, instrument, exposure_id, visit, image_type, band, exposure_s, ra, dec,"
            " rotation, begin_tai) VALUES (%s, %s, %s, %s, %s, 'r', 30, %s, %s, 0, %s)",
            (
                obs_id,
                CAMERA.name,
                *[ObsId.parse(obs_id).exposure_id] * 2,
                image_type,
                tile.ra,
                tile.dec,
                begin,
            ),
        )
        database.execute(
            "INSERT INTO ledger.hop (obs_id, detector, detector_name, hop, outcome, place, path, hop_tai, recv_tai)"
            " VALUES (%s, 0, %s, 'at_archive', 'ok', 'archive', %s, %s, %s)",
            (obs_id, DETECTOR.name, str(files[obs_id]), begin, begin),
        )


def maker(world, lines=None, **more):
    site, _, _, database = world
    told = lines.append if lines is not None else (lambda _: None)
    return TemplateMaker(site, database, Clock.real(), CAMERA, say=told, **({"rules": RULES} | more))


def chosen_template(world, *, obs_id=""):
    site, _, tile, _ = world
    field = Field.predict(CAMERA, DETECTOR, tile.ra, tile.dec, rotation=0.0)
    airmass = airmass_at(site.root, NIGHT, tile.ra, tile.dec)
    return InputLoader(site.root).template(CAMERA, DETECTOR, field, "r", airmass, obs_id)


def names(row):
    return [one["obs_id"] for one in json.loads(open(row["path"].replace(".fits", ".json")).read())["inputs"]]


def test_visits_become_templates_one_after_the_other(world, monkeypatch):
    ids = [obs_id for obs_id, _ in VISITS]
    archive(world, *ids[:2])
    lines: list[str] = []
    one = maker(world, lines)
    (place,) = one.places()
    assert (place.tile, place.band, place.detector) == ("T", "r", DETECTOR.name)
    assert chosen_template(world)[0] == "T"
    (row,) = one.make(place)
    assert (row["version"], row["airmass"], row["visits"]) == ("x1_v1", [1.0, 2.9], ids[:2])
    assert one.make(place) == []  # nothing new
    assert sum("XC_O" in line for line in lines) == 2
    name, exposure = chosen_template(world)
    assert name == "T x1_v1"
    assert exposure.metadata["depth"].max() == 2
    first = load_exposure(row["path"])

    # one visit more: the process dies after the file was written, then before it was listed
    archive(world, ids[2])
    for function in ("write_atomic", "update_index"):
        monkeypatch.setattr(templates, function, _dies)
        with pytest.raises(_Died):
            maker(world).make(place)
        monkeypatch.undo()
        assert chosen_template(world)[0] == "T x1_v1"
    lines.clear()
    again = maker(world, lines)
    made = again.make(place)
    assert not [line for line in lines if ids[0] in line or ids[1] in line]  # only the new one was calibrated
    name, after = chosen_template(world)
    assert name == "T x1_v2"
    assert made == [] or made[0]["version"] == "x1_v2"
    versions = again.store.versions(place, 1.0)
    assert [one["visits"] for one in versions] == [ids[:2], ids]
    weights = [i["weight"] for i in versions[-1]["inputs"]]
    assert sum(weights) == pytest.approx(1.0)
    assert {len(i["raws"][0]["sha256"]) for i in versions[-1]["inputs"]} == {71}
    assert all("r_R00_S00.fits" in i["calibrations"] for i in versions[-1]["inputs"])

    # the version before is as it was, and the new one is what all at once give
    np.testing.assert_array_equal(load_exposure(row["path"]).image, first.image)
    fresh = maker(world)
    fresh.store = TemplateStore(world[0].root / "elsewhere")
    (at_once,) = fresh.make(place)
    whole = load_exposure(at_once["path"])
    for plane in ("image", "variance", "mask"):
        np.testing.assert_array_equal(getattr(whole, plane), getattr(after, plane))

    # a visit is not compared with itself
    assert chosen_template(world, obs_id=ids[0])[0] == "T"

    # raw files that left the cache: what was made of them stays in use
    hidden = {path: path.with_suffix(".hidden") for path in world[1].values()}
    for path, other in hidden.items():
        path.rename(other)
    try:
        assert maker(world).make(place) == []
        decision = maker(world).decide(place)
        assert [c.obs_id[:20] for c in decision.choices[0].chosen] == ids
        shutil.rmtree(world[0].root / "archive" / "templates" / "resampled")
        reasons = {r.reason for r in maker(world).decide(place).choices[0].refused}
        assert reasons == {"its raw file is not in the archive's cache any more"}
    finally:
        for path, other in hidden.items():
            other.rename(path)


def test_what_prompt_processing_told_is_believed(world, tmp_path):
    """Its numbers spare the calibration of those that are left out; what it could not use is none for a template."""
    ids = [obs_id for obs_id, _ in VISITS]
    archive(world, *ids)
    bus = open_bus(f"sqlite:///{tmp_path / 'bus.db'}", identity="test", clock=Clock.real())
    try:
        for number, obs_id in enumerate(ids):
            quality = {
                "seeing": 0.8 + 0.8 * (number == 1),
                "zeroPoint": 28.0,
                "skyLevel": 600.0,
                "limitingMagnitude": 24.0,
            }
            about = {"visit": ObsId.parse(obs_id).exposure_id, "detector": 0, "instrument": CAMERA.name}
            bus.publish("Prompt.visitQuality", about | quality)
        world[3].execute(
            "INSERT INTO ledger.hop (obs_id, detector, hop, outcome, place, message, hop_tai, recv_tai)"
            " VALUES (%s, 0, 'processed', 'UnprocessableData', 'archive', 'a double image', 1, 1)",
            (ids[2],),
        )
        rules = Templates(fewest_visits=1, airmass_edges=[1.0, 2.9])
        lines: list[str] = []
        one = maker(world, lines, bus=bus, rules=rules)
        (place,) = one.places()
        (choice,) = one.decide(place).choices
        assert lines == []  # nothing was calibrated
        assert [c.obs_id for c in choice.chosen] == [f"{ids[0]}_{DETECTOR.name}"]
        reasons = {r.obs_id[:20]: r.reason for r in choice.refused}
        assert reasons[ids[1]].startswith("seeing 1.60 arcsec")
        assert reasons[ids[2]] == "prompt processing: UnprocessableData: a double image"

        # told to be good, but it can not be calibrated: left out, and the template is made of the others
        world[3].execute("DELETE FROM ledger.hop WHERE hop = 'processed'")
        file = world[1][ids[0]]
        content = file.read_bytes()
        file.write_bytes(content[:20000])
        try:
            one = maker(world, bus=bus, rules=rules)
            (row,) = one.make(place)
        finally:
            file.write_bytes(content)
    finally:
        bus.close()
    assert row["visits"] == [ids[2]]
    refused = {r["name"][:20]: r["reason"] for r in one.store.versions(place, 1.0)[-1]["refused"]}
    assert refused[ids[0]].startswith("BadFile: ")
    assert refused[ids[1]].startswith("seeing 1.60 arcsec")


class _Died(BaseException):
    """As if the process had been killed."""


def _dies(*_arguments, **_names):
    raise _Died


def test_commands(world, monkeypatch):
    """What a user does, with rules of the site's own file."""
    site, _, _, database = world
    path = site.root / SITE_FILE
    text = path.read_text()
    lines = [
        f"database: {database.dsn}" if line.startswith("database:") else line for line in text.splitlines()
    ]
    path.write_text("\n".join([*lines, "templates: {fewest_visits: 2, airmass_edges: [1.0, 2.9]}", ""]))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))

    def call(*words):
        done = CliRunner().invoke(template, [*words, "--site", str(site.root)], catch_exceptions=False)
        return done.exit_code, done.stdout

    try:
        assert call("make") == (0, "no visits at the archive\n")
        archive(world, VISITS[0][0])
        archive(world, VISITS[1][0], image_type="FLAT")
        code, out = call("choose", "--json")
        (row,) = json.loads(out)
        assert code == 0
        assert row["ranges"][0]["refused"][0]["reason"] == "good, one of 1: at least 2 make a template"
        with pytest.raises(UserError, match=r"is of field Tee; expected T$"):
            call("make", "--tile", "T", "--tile", "Tee")
        database.execute("UPDATE ledger.image SET image_type = 'OBJECT'")
        code, out = call("make", "--json")
        told = json.loads(out)
        assert (code, told["places"], len(told["made"]), told["failed"]) == (0, 1, 1, [])
        code, out = call("list", "--inputs")
        assert "● T r R00_S00  any airmass, made with the site" in out
        assert "● T r R00_S00  airmass 1-2.9  x1_v1, 2 visits" in out
        assert f"{VISITS[0][0]}_R00_S00  weight 0." in out
        assert json.loads(call("list", "--json", "--band", "g")[1]) == []
        # a detector without calibrations says so, and is not the end of the others
        (site.root / "archive" / "calibs" / CAMERA.name / "r_R00_S00.fits").rename(site.root / "away.fits")
        shutil.rmtree(site.root / "archive" / "templates" / "resampled")
        shutil.rmtree(site.root / "archive" / "templates" / "measured")
        code, out = call("make", "--json")
        assert code == 1
        assert "r_R00_S00.fits" in json.loads(out)["failed"][0]["error"]
    finally:
        path.write_text(text)
        if (site.root / "away.fits").exists():
            (site.root / "away.fits").rename(
                site.root / "archive" / "calibs" / CAMERA.name / "r_R00_S00.fits"
            )


def test_a_folder_without_site_is_told(tmp_path):
    with pytest.raises(NotFoundError, match="no site here"):
        CliRunner().invoke(template, ["list", "--site", str(tmp_path)], catch_exceptions=False)
