"""The plan as the scheduler makes it: one row from the prediction to the exposure, with one identifier."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from cumbre.access.images.catalogue import ImageCatalogue
from cumbre.access.plan import PlanKeeper
from cumbre.access.published import prepare
from cumbre.bus import open_bus
from cumbre.catalogs.level1 import prepare as prepare_level1
from cumbre.core.configuration import Site
from cumbre.core.instrument import load_instrument
from cumbre.ledger import prepare as prepare_ledger
from cumbre.observatory.ephemeris import sidereal_time
from cumbre.observatory.scheduler import NIGHT_FILE, PREDICTED, ObservingService
from cumbre.observatory.visits import SURVEY_FILE
from cumbre.site.profiles import create_site

NIGHT = 1_795_230_000.0  # in the night of 2026-11-20


class StepClock:
    """Night time that moves when the test says so."""

    def __init__(self) -> None:
        self.now = NIGHT

    def now_tai_s(self) -> float:
        return self.now

    def wall_s(self, night_s: float) -> float:
        return 0.0


@pytest.fixture
def night(tmp_path, database):
    """Site, bus, clock, and a keeper of the plan with its tables."""
    create_site(tmp_path / "site")
    site = Site.load(tmp_path / "site")
    ra = float(sidereal_time(NIGHT, site.config.observatory.longitude_deg))
    tiles = [{"name": f"t{i}", "ra": (ra + 4.0 * i) % 360, "dec": -35.0} for i in range(3)]
    (site.root / SURVEY_FILE).write_text(json.dumps(tiles))
    (site.root / NIGHT_FILE).write_text(json.dumps({"visits": 4, "state": "running"}))
    prepare_ledger(database)
    prepare_level1(database)
    ImageCatalogue(database, ["democam"], embargo_s=0.0)
    prepare(database, observatory="x", authority="x.y")
    clock = StepClock()
    with open_bus(f"sqlite:///{tmp_path}/bus.db", identity="test", clock=clock) as bus:
        keeper = PlanKeeper(bus, database, {"DemoCam": load_instrument("democam")})
        yield site, bus, clock, keeper


def states(database) -> dict[str, str]:
    rows = database.execute("SELECT obs_id, execution_status FROM access.ivoa_obsplan_public ORDER BY t_min")
    return dict(rows)


def test_planned_then_scheduled_then_performed_under_one_id(night, database):
    site, bus, clock, keeper = night
    service = ObservingService(site=site, bus=bus, clock=clock)
    service.step(0.0)
    clock.now += 30
    service.step(0.0)
    keeper.step()
    first = states(database)
    assert Counter(first.values()) == {"Scheduled": 1, "Planned": 3}  # four visits were ordered
    assert all(name.startswith("DemoCam-20261120-") for name in first)
    planned = [name for name, state in first.items() if state == "Planned"]
    seen = {name: [state] for name, state in first.items()}
    group_of: dict[str, str] = {}
    for _ in range(60):
        clock.now += 5.0
        service.step(0.0)
        for visit in bus.replay(["Camera.takeImages"]):
            group = visit.fields["groupId"]
            if group not in group_of and clock.now > visit.snd_tai + 32:
                group_of[group] = ""
                number = len(group_of)
                database.execute(
                    "INSERT INTO ledger.image (obs_id, instrument, exposure_id, group_id, day_obs, seq_num, image_type,"
                    " exposure_s, begin_tai, end_tai) VALUES (%s, 'DemoCam', %s, %s, 20261120, %s, 'OBJECT', 30, %s, %s)",
                    (f"XC_O_20261120_{number:06d}", number, group, number, visit.snd_tai, visit.snd_tai + 30),
                )
                bus.publish("Camera.endReadout", {"groupId": group, "instrument": "DemoCam"})
        keeper.step()
        for name, state in states(database).items():
            if seen.setdefault(name, [state])[-1] != state:
                seen[name].append(state)
    assert len(group_of) == 4
    assert set(seen) == set(first)  # no row came under another name
    assert [seen[name] for name in planned] == [["Planned", "Scheduled", "Performed"]] * 3
    rows = database.execute("SELECT obs_id, group_id, s_region IS NOT NULL FROM access.ivoa_obsplan_public")
    assert {group for _, group, _ in rows} == set(group_of)
    assert all(has_region for _, _, has_region in rows)
    service.close()


def test_a_new_prediction_replaces_the_one_before(night, database):
    bus, keeper = night[1], night[3]

    def predict(*numbers: int) -> None:
        n = len(numbers)
        bus.publish(
            "Scheduler.predictedSchedule",
            {"instrument": "DemoCam", "targetId": list(numbers), "ra": [1.0] * n, "decl": [2.0] * n,
             "rotation": [0.0] * n, "filter": ["r_demo"] * n, "exposureTime": [30.0] * n,
             "startTai": [NIGHT + 40.0 * k for k in numbers], "survey": ["T"] * n},
        )  # fmt: skip
        keeper.step()

    predict(*range(1, PREDICTED + 1))
    assert len(states(database)) == PREDICTED
    predict(2, 3)
    assert [name.rpartition("-")[2] for name in states(database)] == ["2", "3"]
    visit = {"groupId": "g2", "position": [1.0, 2.0], "startTime": NIGHT + 81.0, "cameraAngle": 0.0, "nimages": 1,
             "filters": "r_demo", "duration": 30.0, "instrument": "DemoCam", "survey": "T", "scriptSalIndex": 2}  # fmt: skip
    bus.publish("ScriptQueue.nextVisit", visit)
    predict()
    assert states(database) == {"DemoCam-20261120-2": "Scheduled"}
    bus.publish("ScriptQueue.nextVisit", visit)  # told twice
    predict(2)
    assert states(database) == {"DemoCam-20261120-2": "Scheduled"}
    # a queue that was set up anew counts from one again: its visits are rows of their own
    bus.publish("ScriptQueue.nextVisit", visit | {"groupId": "other"})
    bus.publish("ScriptQueue.nextVisitCanceled", {"groupId": "g2"})
    predict()
    assert states(database) == {"DemoCam-20261120-2": "Aborted", "other": "Scheduled"}


def test_a_visit_of_two_exposures_is_performed_with_the_second(night, database):
    bus, keeper = night[1], night[3]
    visit = {"groupId": "g2", "position": [1.0, 2.0], "startTime": NIGHT + 81.0, "cameraAngle": 0.0, "nimages": 2,
             "filters": "r_demo", "duration": 32.0, "instrument": "DemoCam", "survey": "T", "scriptSalIndex": 2}  # fmt: skip
    bus.publish("ScriptQueue.nextVisit", visit)
    keeper.step()
    assert database.execute("SELECT exposures, duration_s FROM access.plan") == [(2, 32.0)]
    seen = []
    for number in (1, 2):
        begin = NIGHT + 81.0 + 17.0 * number
        database.execute(
            "INSERT INTO ledger.image (obs_id, instrument, exposure_id, group_id, image_type, exposure_s, begin_tai, end_tai)"
            " VALUES (%s, 'DemoCam', %s, 'g2', 'OBJECT', 15, %s, %s)",
            (f"XC_O_20261120_{number:06d}", number, begin, begin + 15.0),
        )
        seen += states(database).values()
    assert seen == ["Scheduled", "Performed"]
    assert database.execute("SELECT t_exptime FROM access.ivoa_obsplan_public") == [(30.0,)]
