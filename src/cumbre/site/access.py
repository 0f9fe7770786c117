"""Data access of a site: its tables, images, plan and limits put together for the web service to mount."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from cumbre.access.calibrations import FOLDER as CALIBRATIONS
from cumbre.access.calibrations import CalibrationKeeper
from cumbre.access.classes import UserClass
from cumbre.access.engines import Engines
from cumbre.access.http.butler import Butlers
from cumbre.access.http.login import Login, PageGuard
from cumbre.access.http.service import AccessService, Settings
from cumbre.access.identity_local import CLIENT, KEY_FILE, USERS_FILE, LocalProvider, Users
from cumbre.access.identity_oidc import OidcProvider
from cumbre.access.images.catalogue import ImageCatalogue
from cumbre.access.limits import Limits
from cumbre.access.plan import PlanKeeper
from cumbre.access.published import prepare, set_setting, site_tables
from cumbre.access.released_butlers import FOLDER as RELEASED
from cumbre.access.released_butlers import ReleasedButlers
from cumbre.access.releases.registry import Releases
from cumbre.access.snapshots import FOLDER as SNAPSHOTS
from cumbre.access.snapshots import Snapshots
from cumbre.access.tables import Tables
from cumbre.access.tap_schema import with_tap_schema
from cumbre.access.tokens_login import Logins
from cumbre.access.user_tables import UserTables
from cumbre.alerts.archive import FOLDER as ALERTS
from cumbre.alerts.archive import AlertArchive
from cumbre.core import configuration
from cumbre.core.configuration import Site
from cumbre.core.errors import CumbreError
from cumbre.core.time import Clock
from cumbre.stores.postgres import Database

if TYPE_CHECKING:
    from cumbre.bus import Bus

log = logging.getLogger(__name__)

UPKEEP_S = 20.0
PROVIDER_PATH = "/idp"


class SiteAccess:
    """What the web service mounts: routes, and upkeep in its steps.

    Parameters
    ----------
    site, bus, clock, db
        Of the site.
    """

    def __init__(self, *, site: Site, bus: Bus | None, clock: Clock, db: Database) -> None:
        from cumbre.catalogs.level1 import prepare as prepare_level1
        from cumbre.ledger import prepare as prepare_ledger

        config = site.config
        self._site, self._clock, self._db = site, clock, db
        prepare_ledger(db)
        prepare_level1(db)
        self.catalogue = ImageCatalogue(
            db, config.instruments, embargo_s=config.retention.embargo_hours * 3600,
            proprietary_s=config.access.proprietary_hours * 3600,
        )  # fmt: skip
        prepare(db, observatory=config.observatory.name, authority=config.access.authority)
        scratch = site.root / "access" / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        own = UserTables(db)
        self.service = AccessService(
            root=site.root, db=db, tables=tables_of(site, db, clock, own), own=own, engines=Engines(db, scratch=scratch),
            catalogue=self.catalogue, authority=config.access.authority, settings=settings_of(site),
            alerts=AlertArchive(db, site.path(ALERTS), clock), butlers=self._butlers(),
        )  # fmt: skip
        if config.profile == "one-machine":
            self.service.identity.local_administrator(site.root)
        self.login = self._login()
        self._plan = None if bus is None else PlanKeeper(bus, db, self.catalogue.instruments)
        self._calibrations = CalibrationKeeper(db, site.path(CALIBRATIONS), self.catalogue.instruments, clock)
        self._snapshots = Snapshots(db, site.path(SNAPSHOTS), clock)
        self._making: threading.Thread | None = None
        self._upkeep_s = -UPKEEP_S
        self.service.start()

    def _butlers(self) -> Butlers | None:
        """The archive's repository and its released copies; None for a site without one."""
        archive = self._site.config.places.get("archive")
        self._released: ReleasedButlers | None = None
        if archive is None or archive.repository is None:
            return None
        whole = self._site.path(archive.repository)
        self._released = ReleasedButlers(whole, self._site.path(RELEASED), self.catalogue)
        return Butlers(self._released.root)

    def _login(self) -> Login:
        """Logins with the provider of the configuration, read when somebody logs in; the built-in one without."""
        config, root = self._site.config.access, self._site.root
        self._local = LocalProvider(Users(root / USERS_FILE), root / KEY_FILE)
        identity, known = self.service.identity, {}

        def provider() -> OidcProvider:
            issuer = config.issuer or self._local.issuer
            if issuer not in known:
                secret = config.client_secret_file
                known[issuer] = OidcProvider(
                    issuer, config.client_id if config.issuer else CLIENT, groups_claim=config.groups_claim,
                    client_secret=self._site.path(secret).read_text().strip() if secret and config.issuer else "",
                )  # fmt: skip
            return known[issuer]

        return Login(
            identity, Logins(identity, self._db), provider, self.service.requests, config.groups,
            is_local=config.issuer is None,
        )  # fmt: skip

    def routes(self) -> list[Any]:
        """Routes to mount at the root."""
        own = [] if self._site.config.access.issuer else self._local.routes(PROVIDER_PATH)
        return [*self.service.routes(), *self.login.routes(), *own]

    def guard(self, application: Any, paths: Sequence[str]) -> Any:
        """Keep pages for those who may see images under embargo, unless they are open."""
        config = self._site.config
        is_open = config.access.pages == "open" or (
            config.access.pages == "auto" and config.web.host in ("127.0.0.1", "localhost", "::1")
        )
        if is_open:
            return application
        begins = {"/" + path.strip("/").partition("/")[0] for path in paths} - {"/"}
        return PageGuard(application, self.login, begins | {"/static"})

    def serve_at(self, url: str) -> None:
        """Tell where the service can be reached, for links in tables."""
        set_setting(self._db, "base_url", url.rstrip("/"))
        self._local.issuer = f"{url.rstrip('/')}{PROVIDER_PATH}"

    def step(self) -> int:
        """Take over new images and visits, release what is due; returns how many were taken over."""
        count = 0
        try:
            self.catalogue.move_horizon(self._clock.now_tai_s())
            count += self.catalogue.take_from_ledger()
            if self._plan is not None:
                count += self._plan.step()
            if time.monotonic() - self._upkeep_s > UPKEEP_S:
                self._upkeep_s = time.monotonic()
                self.service.step()
                self.login.logins.forget_old()
                index = self._site.root / "archive" / "templates" / "index.json"
                name = next(iter(self.catalogue.instruments))
                count += self.catalogue.take_templates(index, name)
                count += self._calibrations.step()
                if self._released is not None:
                    self._released.step()
                self._snapshot()
        except CumbreError as error:
            log.warning("data access: %s", error)
        return count

    def _snapshot(self) -> None:
        """Begin the day's snapshot when the night is over, beside everything else."""
        if (self._making is not None and self._making.is_alive()) or not self._snapshots.due():
            return

        def make() -> None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
            try:
                snapshot = self._snapshots.make()
            except Exception:
                log.exception("today's snapshot of Level 1")
            else:
                log.info("%s: %d rows", snapshot.schema, sum(table.rows for table in snapshot.tables))

        self._making = threading.Thread(target=make, name="snapshot", daemon=True)
        self._making.start()

    def close(self) -> None:
        """Stop running jobs."""
        self.service.close()
        if self._making is not None:
            self._making.join(5)
        if self._released is not None:
            self._released.close()


def tables_of(site: Site, db: Database, clock: Clock, own: UserTables | None = None) -> Tables:
    """Every table of a site: live ones, releases, users' own, and ``tap_schema`` that describes them."""
    tables = site_tables()
    releases = Releases(db, site.path("archive/releases"), clock)
    snapshots = Snapshots(db, site.path(SNAPSHOTS), clock)
    tables.providers += [releases.tables, snapshots.tables, (own or UserTables(db)).tables]
    return with_tap_schema(tables)


def settings_of(site: Site) -> Settings:
    """Limits of a site's configuration."""
    config = site.config.access
    at_once = Limits(rows=config.rows, seconds=config.sync_s, memory_mb=config.memory_mb)
    return Settings(
        sync_limits=at_once, job_limits=replace(at_once, seconds=config.job_s), upload_bytes=config.upload_mb << 20,
        retention=timedelta(days=config.job_days), job_threads=config.jobs,
        regenerated_bytes=int(config.regenerated_gb * (1 << 30)),
        anonymous_per_minute=config.anonymous_per_minute, user_per_minute=config.user_per_minute,
        classes={name: _class_of(given) for name, given in config.classes.items()},
    )  # fmt: skip


def _class_of(given: configuration.UserClass) -> UserClass:
    def changes(limits: configuration.QueryLimits) -> dict[str, float]:
        size = None if limits.gigabytes is None else limits.gigabytes * (1 << 30)
        values = {
            "seconds": limits.seconds,
            "rows": limits.rows,
            "bytes": size,
            "memory_mb": limits.memory_mb,
        }
        return {name: value for name, value in values.items() if value is not None}

    return UserClass(changes(given.sync), changes(given.job), given.per_minute)
