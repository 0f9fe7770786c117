"""Bad input in a running site: every case gets its outcome word and message, and the night goes on.

One small site with real processes. In place of the simulated camera stands a test double that writes what a
camera leaves behind, arrays in its store and events on the bus, wrong in one respect each. All cases are sent
first, then a good image; each test looks for its own case in the ledger.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from cumbre.core.configuration import SITE_FILE, Site
from cumbre.core.ids import ObsId
from cumbre.core.instrument import load_instrument
from cumbre.core.time import isot, parse_isot, tai_from_utc

CAMERA = load_instrument("democam")
NAMES = [detector.name for detector in CAMERA.detectors]
DAY = 20261120
NIGHT = tai_from_utc(parse_isot("2026-11-21T01:00:00"))
RATE = 10.0
IMAGE_TIMEOUT_S = 60.0
LIMIT_S = 45.0
ROLES = (
    "ledger, headers, writer, replicator, base, archive, forwarder, tape-base, tape-archive, wan-summit-base,"
    " wan-base-archive, oods, embargo, prompt"
)
TRUNCATED, CHECKSUM, UNKNOWN, NO_PLACE, UNANNOUNCED, NO_TEMPLATE, NO_STARS, MISSING, HUGE, JUNK_RECORD = (
    range(1, 11)
)
LATER, DUPLICATE, GOOD, SHORT_FITS = 20, 21, 30, 40
NEVER_TAKEN = "2026-11-21T05:00:00.000"


def obs_id(number: int) -> str:
    return f"XC_O_{DAY}_{number:06d}"


class Camera:
    """Writes images into the camera's store and tells the bus, right or wrong as asked."""

    def __init__(self, site: Site, bus, tile, pixels: dict[str, np.ndarray]) -> None:
        self.site, self.bus, self.tile, self.pixels = site, bus, tile, pixels

    def group(self, number: int) -> str:
        return isot(NIGHT + number)

    def announce(self, group: str, ra: float | None = None) -> None:
        now = self.bus.clock.now_tai_s()
        self.bus.publish(
            "ScriptQueue.nextVisit",
            {
                "groupId": group, "coordinateSystem": 2, "position": [ra or self.tile.ra, self.tile.dec],
                "startTime": now, "rotationSystem": 2, "cameraAngle": 0.0, "filters": "r_demo", "dome": 2,
                "duration": 30.0, "nimages": 1, "instrument": CAMERA.name, "survey": "T",
            },
        )  # fmt: skip

    def store(self, number: int, names: list[str], pixels=None, *, ra=None, sums=None) -> Path:
        """Arrays and exposure.json as the camera makes them."""
        folder = self.site.path(f"summit/daq/{obs_id(number)}")
        folder.mkdir(parents=True, exist_ok=True)
        checksums = {}
        for name in names:
            path = folder / f"{name}.npy"
            np.save(path, (pixels or self.pixels)[name if name in NAMES else NAMES[0]])
            checksums[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        begin = self.bus.clock.now_tai_s() - 32
        info = {
            "obs_id": obs_id(number), "instrument": CAMERA.name, "detectors": names,
            "sha256": checksums | (sums or {}), "group_id": self.group(number), "image_type": "OBJECT",
            "exposure_s": 30.0, "filter": "r_demo", "ra": self.tile.ra if ra is None else ra,
            "dec": self.tile.dec if ra is None or np.isfinite(ra) else ra, "rotation": 0.0,
            "begin_tai": begin, "end_tai": begin + 30.0,
        }  # fmt: skip
        (folder / "exposure.json").write_text(json.dumps(info))
        return folder

    def events(self, number: int, names: list[str], *, ra=None) -> None:
        """All events of one image."""
        ra = self.tile.ra if ra is None else ra
        dec = self.tile.dec if np.isfinite(ra) else ra
        pairs = {"filter": "r_demo", "ra": str(ra), "dec": str(dec), "rotation": "0.0", "program": "survey"}
        now = self.bus.clock.now_tai_s()
        block = {
            "instrument": CAMERA.name, "imagesInSequence": 1, "imageName": obs_id(number), "imageIndex": 1,
            "imageSource": "XC", "imageController": "O", "imageDate": str(DAY), "imageNumber": number,
            "timestampAcquisitionStart": now - 32, "groupId": self.group(number),
            "additionalKeys": list(pairs), "additionalValues": list(pairs.values()),
        }  # fmt: skip
        publish = self.bus.publish
        publish(
            "Camera.startIntegration", block | {"exposureTime": 30.0, "imageType": "OBJECT", "timeout": 20.0}
        )
        publish("Camera.startReadout", block)
        publish(
            "Camera.endReadout",
            block
            | {
                "requestedExposureTime": 30.0, "timestampEndOfReadout": now,
                "daqPath": f"summit/daq/{obs_id(number)}", "detectors": names,
            },
        )  # fmt: skip
        publish(
            "Camera.endOfImageTelemetry",
            block
            | {
                "timestampDateObs": now - 32, "timestampDateEnd": now - 2,
                "measuredShutterOpenTime": 30.0, "darkTime": 30.5, "emulatedImage": "",
            },
        )  # fmt: skip

    def take(self, number: int, names: list[str], **how) -> None:
        self.store(number, names, **how)
        self.events(number, names, ra=how.get("ra"))


def prepared(root: Path):
    """A site with flat calibrations and a template of one earlier visit; (site, tile, pixels of a good image)."""
    from cumbre.payloads.calibrate import calibrate
    from cumbre.payloads.calibration import Calibrations
    from cumbre.payloads.exposure_file import save_exposure
    from cumbre.payloads.isr import assemble_and_correct
    from cumbre.payloads.refcat import RefCat
    from cumbre.simulator.exposure import ExposureRequest
    from cumbre.simulator.preparation import prepare_sky
    from cumbre.simulator.render import render
    from cumbre.site import preparation
    from cumbre.site.profiles import create_site

    create_site(root, rate=RATE)
    path = root / SITE_FILE
    text = path.read_text().replace("tiles: 3", "tiles: 1").replace("workers: 2", "workers: 1")
    text = text.replace("deadline_s: 60", f"deadline_s: 900\n  image_timeout_s: {IMAGE_TIMEOUT_S}")
    text = text.replace("control: true", "control: false")
    path.write_text(f"{text}roles: [{ROLES}]\n")
    site = Site.load(root)
    sky = prepare_sky(site)
    tile = sky.tiles[0]
    reference = RefCat.load(preparation.paths(site)["refcat"])
    templates = preparation.paths(site)["templates"]
    rows, pixels = [], {}

    def request(name: str, begin_tai: float) -> ExposureRequest:
        return ExposureRequest(name, "OBJECT", 30.0, "r_demo", tile.ra, tile.dec, 0.0, begin_tai)

    for detector in CAMERA.detectors:
        calibrations = Calibrations(flat=np.ones(detector.shape, np.float32))
        calibrations.save(preparation.calibration_path(site, CAMERA, detector.name, "r"))
        pixels[detector.name] = render(CAMERA, detector, request(obs_id(GOOD), NIGHT + 60), sky, 1)
        earlier = request("XC_O_20261010_000001", NIGHT - 38 * 86164.0905)
        raw = preparation.take_frame(site, CAMERA, detector.name, earlier, sky)
        target = templates / "T" / f"r_{detector.name}.fits"
        save_exposure(
            calibrate(assemble_and_correct(raw, calibrations), reference, instrument=CAMERA), target
        )
        rows.append(
            {
                "tile": "T",
                "ra": tile.ra,
                "dec": tile.dec,
                "band": "r",
                "detector": detector.name,
                "path": str(target),
            }
        )
    (templates / "index.json").write_text(json.dumps(rows))
    return site, tile, pixels


def send_bad_images(camera: Camera) -> None:
    """Everything that can be wrong with an image, one image each."""
    one, two = NAMES[:1], NAMES[:2]
    folder = camera.store(TRUNCATED, two)
    path = folder / f"{NAMES[0]}.npy"
    content = path.read_bytes()[: -len(path.read_bytes()) // 3]
    path.write_bytes(content)
    record = json.loads((folder / "exposure.json").read_text())
    record["sha256"][NAMES[0]] = hashlib.sha256(content).hexdigest()  # cut before the camera counted
    (folder / "exposure.json").write_text(json.dumps(record))
    camera.events(TRUNCATED, two)
    camera.take(CHECKSUM, two, sums={NAMES[0]: "0" * 64})
    camera.take(UNKNOWN, [NAMES[0], "R99_S99"])
    camera.take(NO_PLACE, one, ra=float("nan"))
    camera.take(UNANNOUNCED, one)
    camera.announce(NEVER_TAKEN)
    far = (camera.tile.ra + 5.0) % 360
    camera.announce(camera.group(NO_TEMPLATE), far)
    camera.take(NO_TEMPLATE, one, ra=far)
    noise = np.random.default_rng(7).normal(1800, 20, camera.pixels[NAMES[0]].shape).astype(np.uint16)
    camera.announce(camera.group(NO_STARS))
    camera.take(NO_STARS, one, pixels={NAMES[0]: noise})
    camera.announce(camera.group(MISSING))
    (camera.store(MISSING, two) / f"{NAMES[1]}.npy").unlink()
    camera.events(MISSING, two)
    with (camera.store(HUGE, one) / f"{NAMES[0]}.npy").open("ab") as stream:
        stream.truncate(64 << 20)
    camera.events(HUGE, one)
    (camera.store(JUNK_RECORD, one) / "exposure.json").write_bytes(b'{"obs_id": \xff')
    camera.events(JUNK_RECORD, one)


def send_bad_messages(camera: Camera) -> None:
    """Messages that no sane service sends, and a line of the log that nobody can read."""
    hop = {
        "obsId": obs_id(GOOD), "instrument": CAMERA.name, "exposureId": ObsId.parse(obs_id(GOOD)).exposure_id,
        "groupId": "g", "detector": 0, "detectorName": NAMES[0], "hop": "sent", "outcome": "ok", "place": "junk",
        "path": "", "byteSize": 1, "checksum": "", "message": "", "attempt": 1, "hopTai": NIGHT,
    }  # fmt: skip
    for wrong in (
        {"obsId": ""}, {"obsId": "\0\0"}, {"obsId": "x" * 5000, "exposureId": 0}, {"hopTai": float("nan")},
        {"hopTai": -1e300}, {"detector": 99999}, {"detector": -7}, {"hop": ""}, {"checksum": "sha256:zz"},
        {"byteSize": -(2**62)}, {"message": "\0 \ud800".encode("utf-8", "replace").decode()},
        {"hop": "at_archive", "detector": 77}, {"hop": "at_archive", "path": "/", "obsId": obs_id(900)},
    ):  # fmt: skip
        camera.bus.publish("Image.hop", hop | wrong)
    camera.bus.publish(
        "Camera.endReadout", {"imageName": "no such name", "instrument": "Nobody", "detectors": ["?"]}
    )
    camera.bus.publish(
        "ScriptQueue.nextVisit", {"groupId": "g", "instrument": CAMERA.name, "position": [float("nan"), 91]}
    )
    with contextlib.closing(sqlite3.connect(camera.site.root / "bus" / "bus.db", timeout=30)) as log, log:
        for junk in ("not JSON", "[1, 2]", '{"obsId": 5, "detector": "many"}', "\x00\xff"):
            log.execute(
                "INSERT INTO log (topic, kind, idx, key, snd_tai, snd_utc, seq_num, identity, origin, fields)"
                " VALUES ('Image.hop', 'event', 0, '', 1e9, 1e9, 1, 'junk', 1, ?)", (junk,)
            )  # fmt: skip


def send_short_fits(camera: Camera) -> None:
    """A raw file at the archive that ends in the middle."""
    source = next(camera.site.path("archive/raw").rglob(f"{obs_id(GOOD)}_{NAMES[0]}.fits"))
    path = camera.site.root / f"{obs_id(SHORT_FITS)}_{NAMES[0]}.fits"
    path.write_bytes(source.read_bytes()[:40_000])
    parsed = ObsId.parse(obs_id(SHORT_FITS))
    camera.bus.publish(
        "Image.hop",
        {
            "obsId": str(parsed), "instrument": CAMERA.name, "exposureId": parsed.exposure_id,
            "groupId": camera.group(SHORT_FITS), "detector": 0, "detectorName": NAMES[0], "hop": "at_archive",
            "place": "archive", "path": str(path), "hopTai": camera.bus.clock.now_tai_s(),
        },
    )  # fmt: skip


class Night:
    """The running site as the tests see it."""

    def __init__(self, site: Site, db) -> None:
        self.site, self.db = site, db

    def hop(self, number: int, hop: str, detector: int = 0, **wanted) -> dict:
        """A hop of the ledger, when it is there."""
        query = "SELECT * FROM ledger.hop WHERE obs_id = %s AND detector = %s AND hop = %s"

        def found():
            for row in self.db.query(query, (obs_id(number), detector, hop)):
                if all(row[key] == value for key, value in wanted.items()):
                    return row
            return None

        return self.wait(found, f"{hop} of image {number}, detector {detector}")

    def wait(self, condition, what: str):
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.1)
        rows = self.db.query(
            "SELECT obs_id, detector, hop, outcome, message FROM ledger.hop WHERE outcome <> 'ok'", ()
        )
        raise AssertionError(f"waited in vain for {what}; failures: {rows}")

    def quarantined(self, number: int, detector: int = 0) -> dict:
        """The quarantine's hop; its file and reason are there."""
        row = self.hop(number, "quarantined", detector)
        kept = Path(row["path"])
        assert kept.is_file()
        assert json.loads(kept.with_name(f"{kept.name}.reason.json").read_text())["outcome"] == row["outcome"]
        return row


@pytest.fixture(scope="module")
def night():
    from cumbre.site.night import set_clock, wait_ready
    from cumbre.site.roles import open_site_bus, site_database
    from cumbre.site.supervisor import start_detached, stop_site

    folder = Path(tempfile.mkdtemp(prefix="cumbre-bad-"))  # short: pytest's paths do not fit in a socket name
    folder.chmod(0o711)
    try:
        site, tile, pixels = prepared(folder / "site")
        set_clock(site)
        start_detached(site)
        try:
            wait_ready(site)
            with contextlib.closing(site_database(site)) as db, open_site_bus(site, "camera") as bus:
                camera, running = Camera(site, bus, tile, pixels), Night(site, db)
                send_bad_images(camera)
                send_bad_messages(camera)
                camera.take(DUPLICATE, NAMES[:1])
                running.hop(DUPLICATE, "written")
                camera.take(DUPLICATE, NAMES[:1], pixels={NAMES[0]: pixels[NAMES[1]]})
                camera.announce(camera.group(GOOD))
                camera.take(GOOD, NAMES)
                running.hop(GOOD, "at_archive")
                send_short_fits(camera)
                yield running
        finally:
            stop_site(site)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    ("number", "words"),
    [(TRUNCATED, "not a readable array"), (CHECKSUM, "the camera gave"), (HUGE, "expected at most")],
)
def test_a_bad_array_is_quarantined(night, number, words):
    row = night.hop(number, "written")
    assert row["outcome"] == "BadFile"
    assert words in row["message"]
    assert night.quarantined(number)["outcome"] == "BadFile"


@pytest.mark.parametrize("number", [TRUNCATED, CHECKSUM])
def test_the_other_detector_of_the_image_is_processed(night, number):
    assert night.hop(number, "archive_tape", 1)["outcome"] == "ok"
    assert night.hop(number, "processed", 1)["outcome"] == "ok"


def test_unknown_detector(night):
    row = night.hop(UNKNOWN, "written", -1)
    assert row["outcome"] == "NotFound"
    assert "R99_S99" in row["message"]
    assert night.quarantined(UNKNOWN, -1)["outcome"] == "NotFound"
    assert night.hop(UNKNOWN, "read_out")["outcome"] == "ok"
    assert night.hop(UNKNOWN, "processed")["outcome"] == "ok"


def test_image_without_position(night):
    assert night.hop(NO_PLACE, "archive_tape")["outcome"] == "ok"  # whatever it shows, it is kept
    row = night.hop(NO_PLACE, "processed")
    assert row["outcome"] in ("UnprocessableData", "BadFile", "NoWorkFound")
    assert any(word in row["message"].lower() for word in ("position", "ra", "coordinate"))


def test_image_without_next_visit_is_processed(night):
    assert night.hop(UNANNOUNCED, "processed")["outcome"] == "ok"


def test_next_visit_without_image(night):
    query = "SELECT * FROM ledger.visit_without_image WHERE group_id = %s"
    rows = night.wait(
        lambda: (found := night.db.query(query, (NEVER_TAKEN,))) and len(found) == len(NAMES) and found,
        "a given-up visit",
    )
    assert {row["outcome"] for row in rows} == {"Deadline"}
    assert all("no image" in row["message"] for row in rows)


def test_no_template(night):
    row = night.hop(NO_TEMPLATE, "processed")
    assert (row["outcome"], "no template" in row["message"]) == ("NoWorkFound", True)


def test_no_stars(night):
    row = night.hop(NO_STARS, "processed")
    assert row["outcome"] == "NoWorkFound"
    assert "star" in row["message"] or "source" in row["message"]


def test_detector_listed_but_missing(night):
    row = night.hop(MISSING, "written", 1)
    assert (row["outcome"], "missing" in row["message"]) == ("BadFile", True)
    assert night.hop(MISSING, "processed", 0)["outcome"] == "ok"


def test_announced_detector_that_never_came_is_told(night):
    row = night.hop(MISSING, "processed", 2)
    assert row["outcome"] == "Deadline"
    assert "no image at the archive" in row["message"]


def test_unreadable_record_of_the_camera(night):
    row = night.hop(JUNK_RECORD, "written", -1)
    assert (row["outcome"], "not JSON" in row["message"]) == ("BadFile", True)


def test_duplicate_with_other_content_keeps_the_first(night):
    row = night.quarantined(DUPLICATE)
    assert row["outcome"] == "Conflict"
    assert "the first one is kept" in row["message"]
    written = night.hop(DUPLICATE, "written")
    assert written["outcome"] == "ok"
    assert night.hop(DUPLICATE, "at_archive")["checksum"] == written["checksum"]


def test_truncated_fits_at_the_archive(night):
    assert night.hop(SHORT_FITS, "processed")["outcome"] == "BadFile"
    assert night.hop(SHORT_FITS, "ingested_embargo")["outcome"] == "BadFile"
    assert night.quarantined(SHORT_FITS)["outcome"] == "BadFile"


def test_bad_messages_are_set_aside(night):
    rows = night.db.query("SELECT topic, outcome, error FROM ledger.bad_message", ())
    assert {row["outcome"] for row in rows} == {"quarantined"}
    assert {row["topic"] for row in rows} == {"Image.hop", "Camera.endReadout"}
    assert len(rows) >= 8


def test_a_good_image_afterwards_goes_all_the_way(night):
    for detector in CAMERA.detectors:
        for hop in (
            "at_base",
            "base_tape",
            "at_archive",
            "archive_tape",
            "ingested_oods",
            "ingested_embargo",
        ):
            assert night.hop(GOOD, hop, detector.id, outcome="ok")
        assert night.hop(GOOD, "processed", detector.id, outcome="ok")


def test_no_service_died(night):
    from cumbre.site.supervisor import read_state

    services = read_state(night.site)["services"]
    assert {s["name"]: s["restarts"] for s in services if s["restarts"]} == {}
