"""A control system with a bus and a database, and what stands around it: pairs, a camera, commanders."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

from cumbre.bus import open_bus
from cumbre.core.configuration import Site, SiteConfig
from cumbre.core.time import Clock
from cumbre.observatory.component.client import RemoteComponent
from cumbre.observatory.control.system import ControlSystem

_NUMBERS = itertools.count(1)


def make_site(root: Path, *, instrument: str = "lsstcomcam", **settings: object) -> Site:
    """A site with one link, summit to base."""
    config = SiteConfig.model_validate(
        {
            "observatory": {"latitude_deg": -30, "longitude_deg": -70},
            "instruments": [instrument],
            "places": {name: {"raw": f"{name}/raw"} for name in ("summit", "base", "archive")},
            "links": [{"source": "summit", "target": "base"}],
        }
        | settings
    )
    return Site(root, config)


class World:
    """One control system (or more) on one bus; ``run`` steps them until something is so."""

    def __init__(self, root, database, *, rate=1.0, person="observer@console", url="", **settings):
        self.site = make_site(root, **settings)
        self.url = url or f"sqlite:///{root}/bus.db"
        self.db = database
        self.clock = Clock.starting_at(2.0e9, rate=rate)
        self._buses = []
        self.bus = self.open_bus(person)
        self.systems = []
        self.pairs = {}

    def open_bus(self, identity):
        """A connection of its own to the bus, closed at the end."""
        self._buses.append(open_bus(self.url, identity=identity, clock=self.clock))
        return self._buses[-1]

    def control(self, role="control-base", **settings):
        """Another control process, in this one."""
        bus = self.open_bus(role)
        system = ControlSystem(site=self.site, bus=bus, clock=self.clock, db=self.db, role=role, **settings)
        self.systems.append(system)
        return system

    def run(self, until, *, limit_s=30.0):
        """Step all systems until it is so."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            for system in self.systems:
                system.step(0.0)
            if found := until():
                return found
            self.beat()
            time.sleep(0.005)
        raise AssertionError(f"not within {limit_s} s: {until}")

    def command(self, entity, verb, *, limit_s=30.0, person=None, **fields):
        """Send a command and step the systems until it is answered."""
        bus = self.bus if person is None else self.open_bus(person)
        answer = []
        client = RemoteComponent(bus, entity)
        thread = threading.Thread(
            target=lambda: answer.append(client.command_now(verb, timeout_s=limit_s, **fields))
        )
        thread.start()
        self.run(lambda: answer, limit_s=limit_s)
        thread.join()
        return answer[0]

    def ready(self, *entities, mode="science"):
        """Bring entities to ENABLED."""
        for entity in entities or ("Archiver",):
            for verb, fields in (("init", {}), ("configure", {"configuration": mode}), ("enable", {})):
                ack = self.command(entity, verb, **fields)
                assert ack.ok, (entity, verb, ack)

    # what stands around

    def register(self, *pairs, pool="fully-operational", link="summit-base"):
        for pair in pairs:
            name = f"replicator-{pair}"
            self.pairs[name] = {"name": name, "link": link, "pair": pair, "pool": pool}
            self.bus.publish("Replicator.registration", {**self.pairs[name], "reason": "boot"})
        self._beaten = 0.0

    def silence(self, pair):
        del self.pairs[f"replicator-{pair}"]

    def beat(self):
        if self.pairs and time.monotonic() - getattr(self, "_beaten", 0.0) > 0.2:
            self._beaten = time.monotonic()
            self.bus.publish_many([("Replicator.heartbeat", fields) for fields in self.pairs.values()])

    def expose(self, instrument="LSSTComCam", *, group="", image_type="OBJECT", exposure_s=30.0):
        """Publish startIntegration of the next image; gives its obs_id."""
        obs_id = f"CC_O_20261120_{next(_NUMBERS):06d}"
        self.bus.publish(
            "Camera.startIntegration",
            {
                "instrument": instrument, "imageName": obs_id, "groupId": group or obs_id,
                "imageType": image_type, "exposureTime": exposure_s,
            },
        )  # fmt: skip
        return obs_id

    def arrive(self, obs_id, detectors, *, hop="at_base", place="base", instrument="LSSTComCam", **more):
        self.bus.publish_many(
            [
                (
                    "Image.hop",
                    {"obsId": obs_id, "instrument": instrument, "detectorName": name, "detector": 0,
                     "hop": hop, "place": place, **more},
                )
                for name in detectors
            ]
        )  # fmt: skip

    def jobs(self, where="true"):
        return self.db.query(f"SELECT * FROM control.job WHERE {where} ORDER BY job_id")

    def orders(self):
        return [message.fields for message in self.bus.replay(["Control.job"])]

    def state(self, entity="Archiver"):
        last = self.bus.latest(f"{entity}.detailedState")
        return last.fields if last else None

    def close(self):
        for system in self.systems:
            system.close()
        for bus in self._buses:
            bus.close()
