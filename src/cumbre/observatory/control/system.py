"""A control system: one process acts under its identity, another waits to take over.

The active one answers commands, hosts the entities, orders and follows jobs. Everything it does is stored
under its lease first, so whoever takes over finds it; what a former holder tries later is refused.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import time
from typing import Any

import cumbre
from cumbre.bus import AckCode, Bus, Message, Subscription
from cumbre.core.configuration import Site
from cumbre.core.errors import CumbreError, TransientError
from cumbre.core.time import Clock
from cumbre.observatory.component import storage
from cumbre.observatory.component.authority import Authority
from cumbre.observatory.component.component import Component
from cumbre.observatory.component.machine import Protocol
from cumbre.observatory.control import software
from cumbre.observatory.control.entities import (
    AlertProductionCluster,
    Archiver,
    CatchUpArchiver,
    EfdReplicator,
    Entity,
)
from cumbre.observatory.control.jobs import JobTable
from cumbre.observatory.control.lease import Acquired, Lease, LeaseLostError
from cumbre.observatory.control.modes import Modes
from cumbre.observatory.control.pairs import PairTable
from cumbre.observatory.control.schema import prepare
from cumbre.observatory.control.tracking import TOPICS, Tracker
from cumbre.stores.postgres import Database

log = logging.getLogger(__name__)

BASE, ARCHIVE = "control-base", "control-archive"
SLICE_S = 0.05
WATCH_S = 0.25
TEND_S = 0.5
RETRY_S = 1.0
PAIRS_S = 10.0
RESULTS = 1000
"""Results taken in at a time: so few that the lease is renewed in time."""
PAIR_TOPICS = ("Replicator.registration", "Replicator.heartbeat", "EfdReplicator.replica",
               "AlertProductionCluster.pool")  # fmt: skip
OWN_COMMANDS = ("Control.lockOut", "Control.allow")


class ControlSystem:
    """Control system of one centre, or the warm spare of it.

    Parameters
    ----------
    identity
        ``control-base`` (hosts the four entities) or ``control-archive``.
    role
        Name of this process's role; the spare's differs.
    """

    survives_faults = True
    """After a fault it reads its state again from the database: making it anew would lose the lease."""

    def __init__(
        self, *, site: Site, bus: Bus, clock: Clock, db: Database, identity: str = BASE, role: str = ""
    ) -> None:
        self.site, self.bus, self.clock, self.db = site, bus, clock, db
        self.identity, self.name = identity, role or identity
        self.settings = site.config.control
        prepare(db)
        self.holder = f"{self.name} {platform.node() or 'localhost'} {os.getpid()}"
        self.lease = Lease(
            db, identity=identity, holder=self.holder, lease_s=self.settings.lease_s, clock=clock,
            boot=os.environ.get("CUMBRE_SUPERVISOR", ""),
            patience_s=0.0 if self.name == identity else self.settings.lease_s,
        )  # fmt: skip
        self.authority = Authority(self.settings.commanders)
        self.pairs = PairTable()
        self.jobs = JobTable(bus=bus, clock=clock, transaction=self.lease.transaction, epoch=self._epoch)
        self.entities = self._make_entities() if identity == BASE else {}
        self._tracker = self._make_tracker() if self.entities else None
        self._subscriptions: dict[str, Subscription] = {}
        self._stale = False
        self._acquired: Acquired | None = None
        self._locked = ""
        self._self_test: dict[str, str] = {}
        self._start: dict[str, str] = {}
        self._next = {"watch": 0.0, "tend": 0.0, "start": 0.0, "pairs": 0.0, "test": 0.0}

    def _make_entities(self) -> dict[str, Entity]:
        kit: dict[str, Any] = {
            "site": self.site, "bus": self.bus, "clock": self.clock, "db": self.db,
            "modes": Modes(self.site.path("modes")), "jobs": self.jobs, "pairs": self.pairs,
            "transaction": self.lease.transaction, "authority": self.authority, "epoch": self._epoch,
            "locked": lambda: self._locked, "software_hash": software.installed_hash(),
        }  # fmt: skip
        made = (Archiver(**kit), CatchUpArchiver(**kit), EfdReplicator(**kit), AlertProductionCluster(**kit))
        return {entity.name: entity for entity in made}

    def _make_tracker(self) -> Tracker:
        archiver, cluster = self.entities["Archiver"], self.entities["AlertProductionCluster"]
        assert isinstance(archiver, Archiver)
        assert isinstance(cluster, AlertProductionCluster)
        return Tracker(jobs=self.jobs, pairs=self.pairs, clock=self.clock, archiver=archiver, cluster=cluster)

    def _epoch(self) -> int:
        return self.lease.epoch

    @property
    def is_active(self) -> bool:
        """Whether this process acts under the identity."""
        return self.lease.epoch > 0 and bool(self._subscriptions)

    # the loop

    def step(self, timeout_s: float) -> int:
        """Act, or watch the one that acts; waits at most ``timeout_s`` real seconds for work."""
        try:
            if self._stale:
                self._reload()
            if not self.is_active:
                return self._watch(timeout_s)
            return self._act(timeout_s)
        except LeaseLostError as error:
            log.warning("%s", error)
            self._let_go()
            return 0
        except Exception:
            self._stale = True
            raise

    def close(self) -> None:
        """Release the identity: the spare goes on at once, without one the next start is a cold boot."""
        self._let_go()
        try:
            self.lease.release()
        except CumbreError as error:
            log.warning("the lease was not released: %s", error)

    def _watch(self, timeout_s: float) -> int:
        acquired = None
        if time.monotonic() >= self._next["watch"]:
            self._next["watch"] = time.monotonic() + WATCH_S
            try:
                acquired = self.lease.acquire()
            except TransientError as error:
                log.warning("%s: %s", self.identity, error)
        if acquired is None:
            time.sleep(min(timeout_s, WATCH_S))
            return 0
        self._acquired = acquired
        self._begin(acquired)
        return 1

    def _let_go(self) -> None:
        for subscription in self._subscriptions.values():
            subscription.close()
        self._subscriptions = {}
        for entity in self.entities.values():
            entity.close()

    def _reload(self) -> None:
        """Read everything again after a fault; what was taken from the bus and not done comes again."""
        self._let_go()
        self._stale = False
        if self.lease.epoch:
            self.lease.renew()
            self._begin(Acquired(warm=True, silent_s=0.0), takeover=False)

    # beginning to act

    def _begin(self, acquired: Acquired, *, takeover: bool = True) -> None:
        begun = time.monotonic()
        cold = not acquired.warm
        log.info("%s acts with epoch %d (%s)", self.holder, self.lease.epoch, "cold" if cold else "warm")
        self._told("testing", acquired)
        self._test()
        self._read_lock()
        if self.entities:
            self.jobs.recover()
            self._subscribe()
            for entity in self.entities.values():
                entity.recover(cold=cold)
            if not cold:
                self.jobs.tell(self.jobs)  # the former holder may have died between storing and ordering
            self._start = dict(self.settings.start) if cold else self._missing_start()
        else:
            self._subscriptions = {"commands": self.bus.subscribe(["Control.system"], start="now")}
        self._told(
            "ready" if not self._faults() else "refused", acquired,
            takeover=acquired.warm and takeover,
            seconds=acquired.silent_s + time.monotonic() - begun,
        )  # fmt: skip

    def _missing_start(self) -> dict[str, str]:
        """What the former holder was still to start: entities of ``control.start`` that are OFFLINE yet untouched."""
        rows = self.db.execute(
            "SELECT DISTINCT split_part(topic, '.', 1) FROM control.command WHERE commander NOT LIKE 'control-%'"
        )
        touched = {row[0] for row in rows}
        return {
            name: mode
            for name, mode in self.settings.start.items()
            if name in self.entities
            and name not in touched
            and not (self.entities[name].state.is_enabled or self.entities[name].state.error_code)
        }

    def _subscribe(self) -> None:
        commands = [topic for entity in self.entities.values() for topic in entity.topics]
        known = [topic for topic in PAIR_TOPICS if topic in self.bus.topics]
        self._subscriptions = {
            "commands": self.bus.subscribe(
                [*commands, *OWN_COMMANDS], start="now", consumer=f"{self.identity}-commands"
            ),
            "results": self.bus.subscribe(list(TOPICS), start="now", consumer=f"{self.identity}-results"),
            "pairs": self.bus.subscribe(known, start="latest"),
            "own": self.bus.subscribe(
                [f"{name}.detailedState" for name in self.entities], start="now"
            ),
        }  # fmt: skip

    def _test(self) -> None:
        """Self test of a boot: bus, database, folders, software."""
        self._self_test = {
            "database": _try(lambda: self.db.execute("SELECT 1")),
            "bus": _try(lambda: self.bus.latest("Control.system")),
            "folders": _try(self._test_folders),
            "software": _try(self._test_software),
        }
        self._next["test"] = time.monotonic() + RETRY_S
        for name, result in self._self_test.items():
            if result != "ok":
                log.error("self test, %s: %s", name, result)

    def _test_folders(self) -> None:
        for folder in ("run", "logs"):
            path = self.site.path(folder)
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".{self.name}.probe"
            probe.write_bytes(b"")
            probe.unlink()

    def _test_software(self) -> None:
        now = self.clock.now_tai_s()
        software.record_installation(self.db, now_tai=now)
        if self.settings.software == "installed":
            software.accept_installed(self.db, by=self.name, now_tai=now)
        if not software.is_accepted(self.db, cumbre.__version__, software.installed_hash()):
            raise CumbreError(
                f"version {cumbre.__version__} with {software.installed_hash()[:15]}… is not accepted; "
                "check the installation, then: cumbre doctor --site DIR --accept-software"
            )

    def _faults(self) -> str:
        return "; ".join(f"{name}: {text}" for name, text in self._self_test.items() if text != "ok")

    def _read_lock(self) -> None:
        rows = self.db.execute("SELECT locked, identity, reason FROM control.lockout")
        self._locked = f"{rows[0][1]}: {rows[0][2]}" if rows and rows[0][0] else ""
        if faults := self._faults():
            self._locked = self._locked or f"self test failed: {faults}"

    def _told(self, state: str, acquired: Acquired, *, takeover: bool = False, seconds: float = 0.0) -> None:
        self.bus.publish(
            "Control.system",
            {
                "identity": self.identity, "holder": self.holder, "epoch": self.lease.epoch, "state": state,
                "selfTest": json.dumps(self._self_test), "version": cumbre.__version__,
                "hash": software.installed_hash(), "takeover": takeover and acquired.warm,
                "takeoverS": seconds if takeover else 0.0,
            },
        )  # fmt: skip

    # acting

    def _act(self, timeout_s: float) -> int:
        end = time.monotonic() + timeout_s
        while True:
            done = self._turn()
            left = end - time.monotonic()
            if done or left <= 0:
                return done
            done = self._commands(min(SLICE_S, left))
            if done:
                return done

    def _keep(self) -> None:
        """Hold the lease: called between all parts of a turn, none of which may take long."""
        if not self.lease.is_sure or self.lease.is_due:
            self.lease.renew()

    def _turn(self) -> int:
        now = time.monotonic()
        self._keep()
        done = self._commands(0.0)
        if self._faults() and now >= self._next["test"]:
            self._test()
            self._read_lock()
            if not self._faults() and self._acquired is not None:
                self._told("ready", self._acquired)
        if not self.entities:
            return done
        done += self._listen()
        for entity in self.entities.values():
            self._keep()
            done += entity.work()
        self._keep()
        done += self._results()
        for entity in self.entities.values():
            self._keep()
            done += entity.advance()
        if now >= self._next["tend"] and self._tracker is not None:
            self._next["tend"] = now + TEND_S
            done += self._tracker.tend()
        if self._start and now >= self._next["start"]:
            done += self._start_up()
        self._store_pairs(now)
        return done

    def _commands(self, timeout_s: float) -> int:
        subscription = self._subscriptions["commands"]
        messages = subscription.poll(timeout_s)
        for message in messages:
            component, _, verb = message.topic.partition(".")
            if message.topic in OWN_COMMANDS:
                self._own_command(message, verb)
            elif component in self.entities:
                self._start.pop(component, None)  # somebody has taken it in hand
                self.entities[component].work()  # what came before a disable is not affected by it
                self.entities[component].handle(message)
            subscription.commit(message)
        return len(messages)

    def _own_command(self, message: Message, verb: str) -> None:
        """Do lockOut or allow: stored with the audit trail, then answered."""
        with self.lease.transaction() as link:
            known = storage.answered(link, message)
        if known is not None:
            self.bus.acknowledge(message, known.ack, known.result)
            return
        code, result = AckCode.COMPLETE, "locked out" if verb == "lockOut" else "allowed"
        if not self.authority.may("Control", verb, message.identity):
            code, result = AckCode.NO_PERMISSION, f"{message.identity} may not"
        now, reason = self.clock.now_tai_s(), str(message.fields.get("reason", ""))
        with self.lease.transaction() as link:
            storage.record(link, message, code, result, epoch=self.lease.epoch, now_tai=now)
            if code is AckCode.COMPLETE:
                link.execute(
                    "INSERT INTO control.lockout VALUES (true, %s, %s, %s, %s) ON CONFLICT (only_one) DO UPDATE "
                    "SET locked = excluded.locked, identity = excluded.identity, reason = excluded.reason, "
                    "since_tai = excluded.since_tai",
                    (verb == "lockOut", message.identity, reason, now),
                )
        if code is AckCode.COMPLETE:
            self._read_lock()
            self.bus.publish(
                "Control.lockedOut",
                {"locked": verb == "lockOut", "by": message.identity, "reason": reason},
            )
        self.bus.acknowledge(message, code, result, error=0 if code is AckCode.COMPLETE else 1)

    def _listen(self) -> int:
        messages = self._subscriptions["pairs"].poll(0.0)
        for message in messages:
            match message.topic:
                case "Replicator.registration":
                    self.pairs.registered(message.fields, message.snd_tai)
                case "Replicator.heartbeat":
                    self.pairs.beat(message.fields, message.snd_tai)
                case _:
                    entity = self.entities[message.topic.partition(".")[0]]
                    assert isinstance(entity, EfdReplicator | AlertProductionCluster)
                    entity.heard(message.fields)
        for message in self._subscriptions["own"].poll(0.0):
            if message.fields["epoch"] < self.lease.epoch:
                # a former holder spoke once more before it noticed: the last value must be ours
                self.entities[message.topic.partition(".")[0]].publish_state(force=True)
        return len(messages)

    def _results(self) -> int:
        subscription = self._subscriptions["results"]
        messages = subscription.poll(0.0, limit=RESULTS)
        if not messages or self._tracker is None:
            return 0
        self._tracker.take_in(messages)
        subscription.commit()
        return len(messages)

    def _store_pairs(self, now: float) -> None:
        names = set(self.pairs.news)
        if now >= self._next["pairs"]:
            self._next["pairs"] = now + PAIRS_S
            names = self.pairs.names()
        if not names:
            return
        with self.lease.transaction() as link:
            link.cursor().executemany(
                "INSERT INTO control.replicator VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (name) DO UPDATE SET "
                "link = excluded.link, pair = excluded.pair, pool = excluded.pool, reason = excluded.reason, "
                "heartbeat_tai = excluded.heartbeat_tai",
                [
                    (p.name, p.link, p.pair, p.pool, p.reason, p.heartbeat_tai)
                    for p in map(self.pairs.named, sorted(names))
                ],
            )
        self.pairs.news.clear()

    # commands of its own, so that an unattended site works

    def _start_up(self) -> int:
        """Bring the entities of ``control.start`` on by the same commands that a person would send."""
        self._next["start"] = time.monotonic() + 0.2
        sent = 0
        for name, mode in list(self._start.items()):
            entity = self.entities.get(name)
            if entity is None:
                log.error("control.start: %s: not one of %s", name, ", ".join(self.entities))
                del self._start[name]
                continue
            state = entity.state
            if state.configuring:
                continue
            if state.protocol is Protocol.OFFLINE:
                self._send(entity, "init")
            elif state.configuration != mode:
                if time.monotonic() < self._next.get(name, 0.0):
                    continue
                self._next[name] = time.monotonic() + RETRY_S
                self._send(entity, "configure", configuration=mode)
            else:
                self._send(entity, "enable")
                del self._start[name]
            sent += 1
        if not sent:
            self._next["start"] = time.monotonic() + 1.0
        return sent

    def _send(self, entity: Component, verb: str, **fields: Any) -> None:
        topic = self.bus.topics[f"{entity.name}.{verb}"]
        now = self.clock.now_tai_s()
        message = Message(
            topic.name, "command", 0, topic.complete(fields), now, now, random.randrange(1, 2**31),
            self.identity, os.getpid(), 0,
        )  # fmt: skip
        entity.handle(message)


def _try(test: Any) -> str:
    try:
        test()
    except (CumbreError, OSError) as error:
        return str(error)
    return "ok"
