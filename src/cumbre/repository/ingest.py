"""The one writer of a place's repository: OODS at the summit, embargo ingest at the archive.

Every ``Image.hop`` of the place's source (``written``, ``at_archive``) is a file to ingest. Files go in
batches, wavefront sensors first. A file that cannot be read is quarantined at once; one that fails is tried
three times, alone; a busy registry delays everything and costs no try. For each file there is
``OODS.imageInOODS`` and a hop; for each image ``OODS.imageComplete``, judged by the manifest beside the files or
by what the camera said it read, and again with the list of missing ones when waiting for them ended. The
order is ingest, publish, save state, commit: a process that dies in between does the last batch again,
which changes nothing. To try a quarantined file again, publish its source hop again.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.capture.hops import HOP_TOPIC, Piece, hop_fields
from cumbre.capture.quarantine import quarantine
from cumbre.core.errors import (
    BadFileError,
    ConfigurationError,
    ConflictError,
    CumbreError,
    TransientError,
    UnprocessableDataError,
)
from cumbre.core.ids import ObsId, manifest_key
from cumbre.core.instrument import load_instrument
from cumbre.repository.pending import ImageState, Item, PendingState, by_priority
from cumbre.repository.records import ONE_TO_ONE
from cumbre.repository.store import RawFile, Repository, create_repository
from cumbre.stores.files import write_atomic

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

END_READOUT = "Camera.endReadout"
IN_OODS = "OODS.imageInOODS"
COMPLETE = "OODS.imageComplete"
OK, INGEST_FAILED, METADATA_FAILED = 0, 1, 2
RETRY_DELAY_S = 2.0
BATCH = 200
_ROLES = {
    # place: service name, source hop, resulting hop, night seconds to wait for missing detectors
    "summit": ("oods", "written", "ingested_oods", 60.0),
    "archive": ("embargo", "at_archive", "ingested_embargo", 600.0),
}
Published = list[tuple[str, dict[str, Any]]]


class IngestService:
    """Ingests the raws of one place into its repository.

    Parameters
    ----------
    place
        ``summit`` (source hops ``written``) or ``archive`` (source hops ``at_archive``).
    complete_after_s
        Night seconds after the last detector at which an image counts as incomplete; 60 at the summit, 600
        at the archive.
    transfer
        Butler transfer mode; ``direct`` leaves files where they are.
    visit_system
        How visits are defined; None for none.

    Raises
    ------
    ConfigurationError
        The place has no repository, or none of the two roles.
    """

    def __init__(
        self,
        *,
        site: Site,
        bus: Bus,
        clock: Clock,
        place: str = "summit",
        complete_after_s: float | None = None,
        transfer: str = "direct",
        visit_system: int | None = ONE_TO_ONE,
    ) -> None:
        if place not in _ROLES:
            raise ConfigurationError(f"ingest at place {place!r}: expected one of {', '.join(_ROLES)}")
        root = site.config.places[place].repository
        if root is None:
            raise ConfigurationError(
                f"{site.root}/site.yaml: places.{place}.repository is empty; name a folder to ingest into"
            )
        self.name, self._source, self._hop, wait_s = _ROLES[place]
        self.place, self._bus, self._clock = place, bus, clock
        self._wait_s = wait_s if complete_after_s is None else complete_after_s
        self._transfer, self._visit_system = transfer, visit_system
        self._instruments = {item.name: item for item in map(load_instrument, site.config.instruments)}
        self._purposes: dict[tuple[str, int], str] = {
            (item.name, detector.id): detector.purpose
            for item in self._instruments.values()
            for detector in item.detectors
        }
        self._state_path = site.path(f"{place}/ingest/{self.name}.json")
        self._quarantine = site.path(f"{place}/quarantine")
        self._raw = site.path(site.config.places[place].raw)
        self._state = self._load_state()
        self._saved = self._state.to_json()
        self._repository = create_repository(site.path(root), self._instruments.values())
        self._subscription = bus.subscribe([HOP_TOPIC, END_READOUT], start="earliest", consumer=self.name)

    @property
    def repository(self) -> Repository:
        """The repository that this service writes."""
        return self._repository

    def close(self) -> None:
        """Release bus and database."""
        self._subscription.close()
        self._repository.close()

    def step(self, timeout_s: float) -> int:
        """Ingest what has arrived or is due again; gives the number of files handled."""
        messages = self._subscription.poll(timeout_s)
        items = {item.key: item for item in self._state.due(self._clock.now_tai_s())}
        for message in messages:
            fields = message.fields
            if message.topic == END_READOUT:
                self._seen(fields["imageName"], fields["instrument"], list(fields["detectors"]))
            elif fields["hop"] == self._source and fields["outcome"] == "ok" and fields["detector"] >= 0:
                item = _item_of(fields)
                items[item.key] = item
        for group in by_priority(list(items.values()), self._purposes):
            for start in range(0, len(group), BATCH):
                self._ingest(group[start : start + BATCH])
        self._judge_images()
        self._save_state()
        if messages:
            self._subscription.commit()
        return len(items)

    # files

    def _ingest(self, items: list[Item]) -> None:
        published: Published = []
        good: list[tuple[Item, RawFile]] = []
        for item in items:
            try:
                good.append((item, self._read(item)))
            except (CumbreError, OSError) as error:
                published += self._failed(item, error, METADATA_FAILED)
        try:
            if good:
                self._write([raw for _, raw in good])
                for item, _ in good:
                    published += self._succeeded(item)
        except TransientError as error:
            # The registry's trouble, not the files': nothing is counted against them.
            log.warning("%s: %s", self.name, error)
            for item, _ in good:
                self._state.retry(item, not_before_tai=self._clock.now_tai_s() + RETRY_DELAY_S, count=False)
        except Exception:
            log.exception("%s: a batch of %d failed, trying its files one by one", self.name, len(good))
            for item, raw in good:
                published += self._ingest_alone(item, raw)
        if published:
            self._bus.publish_many(published)

    def _ingest_alone(self, item: Item, raw: RawFile) -> Published:
        try:
            self._write([raw])
        except Exception as error:  # a worker loop: one bad file must not stop the others
            log.warning("%s: %s: %s", self.name, item.key, error)
            return self._failed(item, error, INGEST_FAILED)
        return self._succeeded(item)

    def _write(self, files: list[RawFile]) -> None:
        self._repository.ingest(files, transfer=self._transfer, visit_system=self._visit_system)

    def _read(self, item: Item) -> RawFile:
        from cumbre.core.header_files import read_metadata

        if item.instrument not in self._instruments:
            raise BadFileError(
                f"{item.path}: instrument {item.instrument!r} is not one of this site's "
                f"({', '.join(self._instruments)}); add it to instruments in site.yaml"
            )
        path = Path(item.path)
        metadata = read_metadata(self._instruments[item.instrument], path)
        if (metadata.obs_id, metadata.detector_id) != (item.obs_id, item.detector):
            raise BadFileError(
                f"{path}: its header says {metadata.obs_id} detector {metadata.detector_id}, it was announced as "
                f"{item.obs_id} detector {item.detector}"
            )
        return RawFile(path, metadata)

    def _succeeded(self, item: Item) -> Published:
        self._seen(item.obs_id, item.instrument, [])
        self._state.ingested(item.obs_id, item.instrument, item.detector_name, self._clock.now_tai_s())
        return [
            (IN_OODS, self._in_oods(item, OK, "ingested")),
            (HOP_TOPIC, self._hop_fields(item, self._hop)),
        ]

    def _failed(self, item: Item, error: Exception, status: int) -> Published:
        """Try again later, or give up and keep the reason."""
        final = isinstance(error, (UnprocessableDataError, ConflictError))
        outcome = error.outcome if isinstance(error, CumbreError) else "Failed"
        message = str(error) or type(error).__name__
        if not final and self._state.retry(
            item, not_before_tai=self._clock.now_tai_s() + RETRY_DELAY_S * item.attempt
        ):
            return [(IN_OODS, self._in_oods(item, status, f"try {item.attempt}: {message}"))]
        known = error if isinstance(error, CumbreError) else CumbreError(message)
        path = Path(item.path)
        kept = quarantine(
            self._quarantine,
            f"{item.obs_id}_{item.detector_name}.fits",
            path if path.is_file() else b"",
            known,
            at_tai=self._clock.now_tai_s(),
            origin=item.path,
        )
        return [
            (IN_OODS, self._in_oods(item, status, message)),
            (HOP_TOPIC, self._hop_fields(item, self._hop, outcome=outcome, message=message)),
            (
                HOP_TOPIC,
                self._hop_fields(item, "quarantined", outcome=outcome, message=message) | {"path": str(kept)},
            ),
        ]

    def _hop_fields(self, item: Item, hop: str, *, outcome: str = "ok", message: str = "") -> dict[str, Any]:
        piece = Piece(item.obs_id, item.instrument, item.group_id, item.detector, item.detector_name)
        return hop_fields(
            self._clock,
            piece,
            hop,
            place=self.place,
            outcome=outcome,
            path=item.path,
            byte_size=item.byte_size,
            checksum=item.checksum,
            message=message,
            attempt=item.attempt,
        )

    def _in_oods(self, item: Item, status: int, description: str) -> dict[str, Any]:
        raft, _, sensor = item.detector_name.partition("_")
        return {
            "camera": item.instrument,
            "obsid": item.obs_id,
            "raft": raft,
            "sensor": sensor,
            "detector": item.detector,
            "statusCode": status,
            "description": description[:2000],
        }

    # images

    def _seen(self, obs_id: str, instrument: str, detectors: list[str]) -> None:
        """Note an image; what the repository has of it counts, whoever ingested it."""
        now = self._clock.now_tai_s()
        if obs_id not in self._state.images and instrument in self._instruments:
            state = self._state.image(obs_id, instrument, now)
            here = self._repository.ingested_detectors(instrument, ObsId.parse(obs_id).exposure_id)
            known = self._instruments[instrument]
            state.ingested = [known.detector(number).name for number in sorted(here)]
        if detectors and instrument in self._instruments:
            self._state.expect(obs_id, instrument, detectors, now)

    def _judge_images(self) -> None:
        for state in self._state.images.values():
            if not state.expected:
                state.expected = self._manifest(state)
        done: list[tuple[ImageState, list[str]]] = [(state, []) for state in self._state.complete()]
        late = []
        for state in self._state.overdue(self._clock.now_tai_s(), self._wait_s):
            if not state.expected:
                state.expected = sorted(d.name for d in self._instruments[state.instrument].detectors)
            late.append((state, state.missing()))
        messages: Published = [
            (
                COMPLETE,
                {
                    "camera": state.instrument,
                    "obsid": state.obs_id,
                    "expected": len(state.expected),
                    "ingested": len(set(state.ingested) & set(state.expected)),
                    "missing": missing,
                    "place": self.place,
                },
            )
            for state, missing in [*done, *late]
        ]
        if messages:
            self._bus.publish_many(messages)

    def _manifest(self, state: ImageState) -> list[str]:
        """Detectors by the manifest beside the raws; empty when there is none (yet)."""
        path = self._raw / manifest_key(state.instrument, ObsId.parse(state.obs_id))
        try:
            return sorted(json.loads(path.read_text())["expectedSensors"])
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s: not a manifest: %s", path, error)
            return []

    # state

    def _load_state(self) -> PendingState:
        try:
            return PendingState.from_json(self._state_path.read_bytes())
        except FileNotFoundError:
            return PendingState()
        except (ValueError, KeyError, TypeError) as error:
            # Only what was under way is lost; the repository itself knows what it has.
            log.warning("%s: unreadable state, beginning anew: %s", self._state_path, error)
            return PendingState()

    def _save_state(self) -> None:
        text = self._state.to_json()
        if text != self._saved:
            self._state_path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._state_path, text)
            self._saved = text


def _item_of(fields: dict[str, Any]) -> Item:
    return Item(
        obs_id=fields["obsId"],
        instrument=fields["instrument"],
        group_id=fields["groupId"],
        detector=fields["detector"],
        detector_name=fields["detectorName"],
        path=fields["path"],
        checksum=fields["checksum"],
        byte_size=fields["byteSize"],
    )
