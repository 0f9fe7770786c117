"""The four commandable entities: what each needs before it is configured, and what enabling each does."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from cumbre.bus import Message, Subscription
from cumbre.core.configuration import Site
from cumbre.core.errors import ConfigurationError, UnprocessableDataError
from cumbre.core.instrument import Instrument
from cumbre.observatory.component.component import Component
from cumbre.observatory.component.configuration import Configuration
from cumbre.observatory.component.machine import State
from cumbre.observatory.control.allocation import allocate, process_parts, replicate_parts
from cumbre.observatory.control.jobs import PROCESS, REPLICATE, SUBMITTED, Job, JobTable
from cumbre.observatory.control.modes import Modes, settings_from_json
from cumbre.observatory.control.pairs import CATCH_UP, FULL, LOCAL, PairTable
from cumbre.observatory.control.software import wrong_installations
from cumbre.observatory.instruments import site_instruments
from cumbre.observatory.visits import AnnouncedVisit
from cumbre.stores.postgres import Database

log = logging.getLogger(__name__)

LEAST_S = 20.0
"""Real seconds that a job has at least where night time runs fast: the machines do not."""
SILENT_S = 10.0
"""Real seconds after which workers or a replica that say nothing do not count."""


def exposure_end(message: Message) -> float:
    """When the exposure of a startIntegration ends, TAI seconds."""
    return message.snd_tai + max(float(message.fields["exposureTime"]), 0.0)


class Entity(Component):
    """A commandable entity of the base control system.

    Parameters
    ----------
    site, db, modes, jobs, pairs
        The observatory, its control database, and what the control system knows.
    """

    def __init__(
        self,
        name: str,
        *,
        site: Site,
        db: Database,
        modes: Modes,
        jobs: JobTable,
        pairs: PairTable,
        **kit: Any,
    ) -> None:
        super().__init__(name, **kit)
        self.site, self.db, self.modes, self.jobs, self.pairs = site, db, modes, jobs, pairs
        self._trigger: Subscription | None = None
        self._parameters: Any = None

    def configurations(self) -> Sequence[str]:
        """Names of all modes."""
        return self.modes.names()

    def configuration(self, name: str) -> Configuration:
        """Read a mode's part for this entity; its software must be on every machine."""
        configuration = self.modes.configuration(name, self.name)
        if wrong := wrong_installations(self.db, configuration.version):
            raise ConfigurationError(
                f"configuration {name!r} needs version {configuration.version}; {'; '.join(wrong)}; install "
                "it there, then: cumbre doctor --site DIR --accept-software"
            )
        return configuration

    def jobs_in_flight(self) -> int:
        """Jobs submitted and not ended."""
        return self.jobs.count(self.name)

    @property
    def parameters(self) -> Any:
        """Parameters of the configuration in force, typed."""
        return settings_from_json(self.name, self._saved.settings)

    def changed(self, before: State, after: State) -> None:
        """Subscribe when enabled, unsubscribe when not."""
        del before
        topic = self.trigger() if after.is_enabled else ""
        if topic and self._trigger is None:
            # durable: what was triggered while another process took over is not missed
            self._trigger = self.bus.subscribe([topic], start="now", consumer=f"control-{self.name}")
        elif not topic and self._trigger is not None:
            self._trigger.close()
            self._trigger = None

    def patience_s(self) -> float:
        """Night seconds that a job of the configuration in force may take."""
        given = float(self.parameters.deadline_s)
        return max(given, LEAST_S * self.clock.rate) if self.clock.rate > 1.0 else given

    @property
    def is_subscribed(self) -> bool:
        """Whether it listens to its trigger."""
        return self._trigger is not None

    def trigger(self) -> str:
        """Event that makes jobs in the configuration in force; "" for none."""
        return ""

    def make_jobs(self, message: Message) -> list[Job]:
        """Give the jobs of one trigger event."""
        del message
        return []

    def work(self) -> int:
        """Turn trigger events into jobs; gives how many."""
        if self._trigger is None:
            return 0
        messages = self._trigger.poll(0.0, limit=20)
        jobs: list[Job] = []
        for message in messages:
            if message.snd_tai < self.enabled_tai:
                continue
            try:
                jobs += self.make_jobs(message)
            except UnprocessableDataError as error:
                self.tell(logging.WARNING, str(error))
        done = self.jobs.submit(jobs)
        if messages:
            self._trigger.commit()
        return done

    def close(self) -> None:
        """Let go of the subscription."""
        if self._trigger is not None:
            self._trigger.close()
            self._trigger = None

    def instrument(self, name: str) -> Instrument:
        """Description of one of the site's cameras.

        Raises
        ------
        UnprocessableDataError
            The site has no such camera.
        """
        known = site_instruments(self.site)
        if name not in known:
            raise UnprocessableDataError(
                f"instrument {name!r}: this site has {', '.join(self.site.config.instruments)}"
            )
        return known[name][1]


class Archiver(Entity):
    """Archives images in real time: on startIntegration, one job a raft and one for the wavefront sensors."""

    def __init__(self, **kit: Any) -> None:
        super().__init__("Archiver", **kit)
        links = self.site.config.links
        first = next((link for link in links if link.source == "summit"), links[0] if links else None)
        self.link = f"{first.source}-{first.target}" if first else ""
        self._turn = 0

    def unmet(self, configuration: Configuration) -> str:
        """Enough registered pairs, of either pool: a pair without its link still stores."""
        wanted = configuration.settings["min_pairs"]
        full, local = self.pairs.pool(self.link, FULL), self.pairs.pool(self.link, LOCAL)
        if len(full) + len(local) >= wanted:
            return ""
        return (
            f"{len(full)} fully-operational and {len(local)} local-only replicator pairs on {self.link}, "
            f"expected {wanted}"
        )

    def trigger(self) -> str:
        """As the mode says."""
        return str(self.parameters.trigger)

    def make_jobs(self, message: Message) -> list[Job]:
        """Give the jobs of an image that begins; none for one so old that the Catch-Up Archiver has it."""
        fields, parameters = message.fields, self.parameters
        now = self.clock.now_tai_s()
        if parameters.image_types and fields["imageType"] not in parameters.image_types:
            return []
        deadline = exposure_end(message) + self.patience_s()
        if now > deadline:
            return []
        parts = replicate_parts(self.instrument(fields["instrument"]))
        pairs = allocate(
            len(parts),
            full=self.pairs.pool(self.link, FULL),
            local=self.pairs.pool(self.link, LOCAL),
            load=self.jobs.load_by_pair(self.link),
            turn=self._turn,
        )
        self._turn += len(parts)
        return [
            Job(
                f"{REPLICATE}/{fields['imageName']}/{part}", self.name, REPLICATE, fields["imageName"],
                fields["groupId"], fields["instrument"], part, detectors, self.link, pair,
                self.state.configuration, SUBMITTED, 1, now, None, deadline,
            )
            for (part, detectors), pair in zip(parts.items(), pairs, strict=True)
        ]  # fmt: skip


class CatchUpArchiver(Entity):
    """Archives what real time missed; its service follows the published state."""

    def __init__(self, **kit: Any) -> None:
        super().__init__("CatchUpArchiver", **kit)

    def unmet(self, configuration: Configuration) -> str:
        """Enough registered pairs of the catch-up pool."""
        have, wanted = self.pairs.count(CATCH_UP), configuration.settings["min_pairs"]
        return "" if have >= wanted else f"{have} catch-up pairs, expected {wanted}"


class EfdReplicator(Entity):
    """Replicates every message of the bus; its service follows the published state."""

    def __init__(self, **kit: Any) -> None:
        super().__init__("EfdReplicator", **kit)
        self._replica: tuple[float, bool, str] | None = None

    def heard(self, fields: dict[str, Any]) -> None:
        """Take in what the replica says."""
        self._replica = time.monotonic(), fields["reachable"], fields["message"]

    def unmet(self, configuration: Configuration) -> str:
        """Communication with the replica."""
        del configuration
        if self._replica is None or time.monotonic() - self._replica[0] > SILENT_S:
            return "the replica does not answer; does the role efd-replicator run?"
        return "" if self._replica[1] else f"the replica cannot be reached: {self._replica[2]}"


class AlertProductionCluster(Entity):
    """Level 1 processing: on nextVisit (or startIntegration), one job a detector; prompt processing does them."""

    def __init__(self, **kit: Any) -> None:
        super().__init__("AlertProductionCluster", **kit)
        self._workers: tuple[float, int] | None = None

    def heard(self, fields: dict[str, Any]) -> None:
        """Take in how many workers there are."""
        self._workers = time.monotonic(), fields["workers"]

    def unmet(self, configuration: Configuration) -> str:
        """Enough workers."""
        wanted = configuration.settings["min_workers"]
        if wanted == 0:
            return ""
        if self._workers is None or time.monotonic() - self._workers[0] > SILENT_S:
            return "prompt processing does not answer; does the role prompt run?"
        have = self._workers[1]
        return "" if have >= wanted else f"{have} workers, expected {wanted}"

    def trigger(self) -> str:
        """As the mode says."""
        topic = str(self.parameters.trigger)
        return "" if topic == "none" else topic

    def make_jobs(self, message: Message) -> list[Job]:
        """Give the jobs of an announced visit or of an exposure that begins; none for one whose time is over."""
        now = self.clock.now_tai_s()
        instrument, group_id, obs_id, end = self._unit(message)
        deadline = end + self.patience_s()
        if now > deadline:
            return []
        parts = process_parts(self.instrument(instrument), wavefront=self.parameters.wavefront)
        return [
            Job(
                f"{PROCESS}/{obs_id or group_id}/{part}", self.name, PROCESS, obs_id, group_id, instrument, part,
                detectors, "", None, self.state.configuration, SUBMITTED, 1, now, None, deadline,
            )
            for part, detectors in parts.items()
        ]  # fmt: skip

    @staticmethod
    def _unit(message: Message) -> tuple[str, str, str, float]:
        """Give instrument, group, image ("" for a visit that is announced) and the expected end, TAI seconds."""
        if message.topic == "Camera.startIntegration":
            fields = message.fields
            return fields["instrument"], fields["groupId"], fields["imageName"], exposure_end(message)
        visit = AnnouncedVisit.from_fields(message.fields)
        return visit.instrument, visit.group_id, "", (visit.start_tai or message.snd_tai) + visit.duration_s
