"""Roles: which services a site runs and how each is made. Only here do the rooms meet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cumbre.archive.pairs import distributor_name, pairs_into, relay_name
from cumbre.bus import Bus, open_bus
from cumbre.core.configuration import Site
from cumbre.core.errors import ConfigurationError, NotFoundError
from cumbre.core.time import Clock

if TYPE_CHECKING:
    from cumbre.stores.postgres import Database


class Service(Protocol):
    """What the runner needs of a component."""

    def step(self, timeout_s: float) -> int:
        """Handle what is pending, waiting at most ``timeout_s`` real seconds; returns how much was done."""

    def close(self) -> None:
        """Let go of what is held."""


Factory = Callable[[Site, Bus, Clock], Service]


def open_site_bus(site: Site, identity: str) -> Bus:
    """The site's bus, embedded or Kafka."""
    url = site.config.bus
    if url == "embedded":
        url = f"sqlite:///{site.root / 'bus' / 'bus.db'}"
    return open_bus(url, identity=identity, clock=open_site_clock(site))


def open_site_clock(site: Site) -> Clock:
    """The site's clock: shared by file, real time where there is none."""
    return Clock.load(site.clock_path)


def site_dsn(site: Site) -> str:
    """DSN of the site's database.

    Raises
    ------
    NotFoundError
        The embedded server was not started yet.
    """
    if site.config.database != "embedded":
        return site.config.database
    path = site.root / "run" / "postgres.dsn"
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().strip()
    raise NotFoundError(
        f"{site.root}: its database is not running; start the site: cumbre up --site {site.root}"
    )


def site_database(site: Site) -> Database:
    """The site's database."""
    from cumbre.stores.postgres import Database

    return Database(site_dsn(site))


def _ledger(site: Site, bus: Bus, clock: Clock) -> Service:
    from cumbre.ledger import LedgerService

    return LedgerService(site=site, bus=bus, db=site_database(site), clock=clock)


def _scheduler(site: Site, bus: Bus, clock: Clock) -> Service:
    from cumbre.observatory.scheduler import ObservingService

    return ObservingService(site=site, bus=bus, clock=clock)


def _camera(site: Site, bus: Bus, clock: Clock) -> Service:
    from cumbre.simulator.camera import SimulatedCamera

    return SimulatedCamera(site=site, bus=bus, clock=clock)


def _headers(site: Site, bus: Bus, clock: Clock) -> Service:
    from cumbre.observatory.header_service import HeaderService

    return HeaderService(site=site, bus=bus, clock=clock)


def _writer(node: int) -> Factory:
    def make(site: Site, bus: Bus, clock: Clock) -> Service:
        from cumbre.capture.writer import ImageWriter

        return ImageWriter(site=site, bus=bus, clock=clock, node=node)

    return make


def _sender(source: str, pair: int) -> Factory:
    def make(site: Site, bus: Bus, clock: Clock) -> Service:
        from cumbre.archive.replicator import Forwarder, Replicator

        kind = Replicator if source == Replicator.source else Forwarder
        return kind(site=site, bus=bus, clock=clock, pair=pair)

    return make


def _distributor(place: str, pair: int) -> Factory:
    def make(site: Site, bus: Bus, clock: Clock) -> Service:
        from cumbre.archive.distributor import Distributor

        return Distributor(site=site, bus=bus, clock=clock, place=place, pair=pair)

    return make


def _tape(place: str) -> Factory:
    def make(site: Site, bus: Bus, clock: Clock) -> Service:
        from cumbre.archive.tape_writer import TapeWriter

        return TapeWriter(site=site, bus=bus, clock=clock, place=place)

    return make


def _catch_up(site: Site, bus: Bus, clock: Clock) -> Service:
    from cumbre.archive.catch_up import CatchUpArchiver

    return CatchUpArchiver(site=site, bus=bus, clock=clock, db=site_database(site))


def _link(source: str, target: str) -> Factory:
    def make(site: Site, bus: Bus, clock: Clock) -> Service:
        from cumbre.simulator.network import LinkProxy

        return LinkProxy(site=site, bus=bus, clock=clock, source=source, target=target)

    return make


def _ingest(place: str) -> Factory:
    def make(site: Site, bus: Bus, clock: Clock) -> Service:
        from cumbre.repository.ingest import IngestService

        return IngestService(site=site, bus=bus, clock=clock, place=place)

    return make


def _prompt(site: Site, bus: Bus, clock: Clock) -> Service:
    from cumbre.orchestration.prompt import PromptService

    return PromptService(site=site, bus=bus, clock=clock, db=site_database(site))


def _relay(site: Site, bus: Bus, clock: Clock) -> Service:
    from cumbre.alerts.relay import OutboxRelay

    return OutboxRelay(site=site, bus=bus, clock=clock, db=site_database(site))


def _alert_archive(site: Site, bus: Bus, clock: Clock) -> Service:
    from cumbre.alerts.archive import AlertArchiveService

    return AlertArchiveService(site=site, bus=bus, clock=clock, db=site_database(site))


def _retention(site: Site, bus: Bus, clock: Clock) -> Service:
    from cumbre.archive.retention import RetentionService
    from cumbre.ledger import Ledger

    return RetentionService(site=site, bus=bus, clock=clock, ledger=Ledger(site_database(site)))


def _scrub(site: Site, bus: Bus, clock: Clock) -> Service:
    from cumbre.archive.scrub import Scrub

    return Scrub(site=site, bus=bus, clock=clock, db=site_database(site))


def _web(site: Site, bus: Bus, clock: Clock) -> Service:
    from cumbre.site.access import SiteAccess
    from cumbre.web.service import WebService

    db = site_database(site)
    access = SiteAccess(site=site, bus=bus, clock=clock, db=db)
    return WebService(site=site, bus=bus, clock=clock, db=db, mounted=[access])


def _control(identity: str, role: str) -> Factory:
    def make(site: Site, bus: Bus, clock: Clock) -> Service:
        from cumbre.observatory.control.system import ControlSystem

        return ControlSystem(
            site=site, bus=bus, clock=clock, db=site_database(site), identity=identity, role=role
        )

    return make


def _efd(site: Site, bus: Bus, clock: Clock) -> Service:
    from cumbre.telemetry.efd_replica import EfdReplicatorService

    return EfdReplicatorService(site=site, bus=bus, clock=clock)


def _watch(site: Site, bus: Bus, clock: Clock) -> Service:
    from cumbre.archive.watch import Watch

    return Watch(site=site, bus=bus, clock=clock, db=site_database(site))


def factories(site: Site) -> dict[str, Factory]:
    """Name of each role of this site → its factory, in the order of the data flow.

    ``roles`` in the site file may name all pairs at once: ``replicator`` for ``replicator-1``, ``replicator-2``…
    """
    simulated = site.config.simulator is not None
    out: dict[str, Factory] = {"ledger": _ledger}
    if site.config.archive.control:
        for identity in ("control-base", "control-archive"):
            out[identity] = _control(identity, identity)
        out["control-base-spare"] = _control("control-base", "control-base-spare")
        out["efd-replicator"] = _efd
    if simulated:
        out |= {"scheduler": _scheduler, "camera": _camera}
    out["headers"] = _headers
    for node in range(1, site.config.capture.writers + site.config.capture.spares + 1):
        out[f"writer-{node}"] = _writer(node)
    for link in site.config.links:
        for pair in range(1, link.pairs + 1):
            out[relay_name(link.source, pair)] = _sender(link.source, pair)
        out[f"wan-{link.source}-{link.target}"] = _link(link.source, link.target)
    for name, place in site.config.places.items():
        if place.listen is not None:
            for pair in range(1, pairs_into(site, name) + 1):
                out[distributor_name(name, pair)] = _distributor(name, pair)
    out |= {f"tape-{name}": _tape(name) for name, place in site.config.places.items() if place.tape}
    if site.config.links:
        out["catch-up"] = _catch_up
    if site.config.places["summit"].repository:
        out["oods"] = _ingest("summit")
    if site.config.places["archive"].repository:
        out["embargo"] = _ingest("archive")
    out |= {
        "prompt": _prompt,
        "relay": _relay,
        "alert-archive": _alert_archive,
        "retention": _retention,
        "scrub": _scrub,
        "watch": _watch,
        "web": _web,
    }
    wanted = site.config.roles
    if wanted is None:
        return out
    groups = {name: name.rpartition("-")[0] for name in out if name.rpartition("-")[2].isdigit()}
    unknown = sorted(set(wanted) - set(out) - set(groups.values()))
    if unknown:
        raise ConfigurationError(
            f"{site.root}/site.yaml: roles = {unknown}: expected some of {', '.join(out)}, or null for all"
        )
    return {name: make for name, make in out.items() if name in wanted or groups.get(name) in wanted}


def roles_of(site: Site) -> list[str]:
    """Names of a site's roles."""
    return list(factories(site))


def build(name: str, site: Site, bus: Bus, clock: Clock) -> Service:
    """Make one service.

    Raises
    ------
    NotFoundError
        The site has no such role.
    """
    known = factories(site)
    if name not in known:
        raise NotFoundError(f"{site.root}: no role {name!r}; this site has {', '.join(known)}")
    return known[name](site, bus, clock)


def log_path(site: Site, name: str) -> Path:
    """Where a role writes its log."""
    return site.root / "logs" / f"{name}.log"
