"""The part of a repository that is released, as a repository of its own: what is under embargo is not in it.

Rights to single data sets are nothing that a Butler knows. So those who may not see everything get another repository,
and no query, count or name can tell more than is in it. Files stay where they are (``direct``); registry and identifiers
are the same. It only grows, as releases are never taken back; what retention deleted is taken out of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.repository.storage import declare
from cumbre.repository.store import exists
from cumbre.stores.files import write_atomic

if TYPE_CHECKING:
    from lsst.daf.butler import Butler, DatasetRef, DatasetType

STATE = "released.json"
PRIVATE = "u/"
"""Begin of the names of users' own collections: they are nobody else's, whatever they hold."""
_TIMELESS = {
    "instrument", "detector", "physical_filter", "band", "skymap", "tract", "patch", "subfilter",
}  # fmt: skip
_CHUNK = 500
_LATE_S = 600.0
"""Ingests may be seen so much later than the time that they tell."""


@dataclass(frozen=True, slots=True)
class Passed:
    """What one look did."""

    added: int
    removed: int


class ReleasedCopy:
    """A repository that follows another one behind a horizon.

    Parameters
    ----------
    source, target
        Folders of the whole repository and of the released one, which is made when absent.
    """

    def __init__(self, source: Path, target: Path) -> None:
        self._source, self.root = source, target

    def follow(self, horizon_tai: float, now_tai: float, *, forget: bool = False) -> Passed:
        """Take over what was released since the last time.

        Parameters
        ----------
        horizon_tai
            Exposures that began before it are released.
        now_tai
            The time of this look, in the same clock as the ingests' (real time).
        forget
            Look also for what was deleted, which reads everything.
        """
        from lsst.daf.butler import Butler

        with Butler.from_config(str(self._source)) as source:
            if not exists(self.root):
                self._make()
            state = self._state()
            with Butler.from_config(str(self.root), writeable=True) as target:
                added = 0
                for kind in source.registry.queryDatasetTypes(...):
                    for refs in batched(self._released(source, kind, state, horizon_tai), _CHUNK):
                        added += _take(source, target, kind, refs)
                removed = self._forget(source, target) if forget else 0
                self._collections(source, target)
        content = {"horizon_tai": horizon_tai, "looked_tai": now_tai - _LATE_S}
        write_atomic(self.root / STATE, json.dumps(content).encode())
        return Passed(added, removed)

    def _make(self) -> None:
        from lsst.daf.butler import Butler, Config

        self.root.mkdir(parents=True, exist_ok=True)
        whole = Config(str(self._source / "butler.yaml"))
        config = Config()
        if "storageClasses" in whole:
            config["storageClasses"] = whole["storageClasses"]
        Butler.makeRepo(str(self.root), config=config)
        declare(self.root)

    def _state(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.root / STATE).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return found

    def _released(
        self, source: Butler, kind: DatasetType, state: dict[str, Any] | None, horizon_tai: float
    ) -> Iterator[DatasetRef]:
        """What of a data set type is released and may be new."""
        from lsst.daf.butler import CollectionType

        runs = [
            name
            for name in source.collections.query("*", collection_types={CollectionType.RUN})
            if not name.startswith(PRIVATE)
        ]
        names = set(kind.dimensions.names)
        clock = "visit" if "visit" in names else "exposure" if "exposure" in names else ""
        if not runs or not (clock or all(n in _TIMELESS or n.startswith(("htm", "healpix")) for n in names)):
            return
        seen: set[Any] = set()
        for where, bind in _looks(kind.name, clock, state, horizon_tai):
            found = source.query_datasets(
                kind, runs, find_first=False, where=where, bind=bind, with_dimension_records=bool(clock),
                explain=False, limit=None,
            )  # fmt: skip
            for ref in found:
                if ref.id in seen or (clock and not _began_before(ref, clock, horizon_tai)):
                    continue
                seen.add(ref.id)
                yield ref

    @staticmethod
    def _forget(source: Butler, target: Butler) -> int:
        """Take out what is not in the whole repository any more."""
        gone: list[DatasetRef] = []
        for kind in target.registry.queryDatasetTypes(...):
            here = target.query_datasets(kind, "*", find_first=False, explain=False, limit=None)
            for refs in batched(here, _CHUNK):
                there = {ref.id for ref in source.get_many_datasets([ref.id for ref in refs])}
                gone += [ref for ref in refs if ref.id not in there]
        if gone:  # files that were taken as they are are not touched
            target.pruneDatasets(gone, disassociate=True, unstore=True, purge=True)
        return len(gone)

    @staticmethod
    def _collections(source: Butler, target: Butler) -> None:
        """The chains of the whole repository, and what holds when in its calibrations, of what is here."""
        from lsst.daf.butler import CollectionType

        for name in source.collections.query("*", collection_types={CollectionType.CALIBRATION}):
            if not name.startswith(PRIVATE):
                _certify(source, target, name)
        here = set(target.collections.query("*"))
        for info in source.collections.query_info("*", collection_types={CollectionType.CHAINED}):
            children = [name for name in info.children if name in here]
            if info.name.startswith(PRIVATE) or not children:
                continue
            target.collections.register(info.name, CollectionType.CHAINED)
            target.collections.redefine_chain(info.name, children)


def _take(source: Butler, target: Butler, kind: DatasetType, refs: Sequence[DatasetRef]) -> int:
    """Register data sets in the target, with the files where they are; returns how many were not there."""
    from lsst.daf.butler import FileDataset

    target.registry.registerDatasetType(kind)
    known = {ref.id for ref in target.get_many_datasets([ref.id for ref in refs])}
    fresh = []
    for ref in refs:
        if ref.id in known:
            continue
        places = source.getURIs(ref)
        if (
            places.primaryURI is not None and places.primaryURI.exists()
        ):  # else deleted meanwhile, or in several files
            fresh.append((ref, places.primaryURI))
    for run in {ref.run for ref, _ in fresh}:
        target.collections.register(run)
    if fresh:
        target.transfer_dimension_records_from(source, [ref for ref, _ in fresh])
        target.ingest(
            *(FileDataset(uri, [ref]) for ref, uri in fresh), transfer="direct", skip_existing=True,
            record_validation_info=False,
        )  # fmt: skip
    return len(fresh)


def _certify(source: Butler, target: Butler, collection: str) -> None:
    """Make a calibration collection hold what it holds in the whole repository."""
    from lsst.daf.butler import CollectionType, Timespan

    def held(butler: Butler, kind: DatasetType) -> list[tuple[DatasetRef, Timespan]]:
        found = butler.registry.queryDatasetAssociations(
            kind, collection, collectionTypes={CollectionType.CALIBRATION}
        )
        return [(one.ref, one.timespan) for one in found if one.timespan is not None]

    for kind in target.registry.queryDatasetTypes(...):
        if not kind.isCalibration():
            continue
        wanted = held(source, kind)
        here = {ref.id for ref in target.get_many_datasets([ref.id for ref, _ in wanted])}
        wanted = [(ref, span) for ref, span in wanted if ref.id in here]
        if wanted:
            target.collections.register(collection, CollectionType.CALIBRATION)
        elif collection not in target.collections.query("*"):
            continue
        now = held(target, kind)
        if {(ref.id, span) for ref, span in now} == {(ref.id, span) for ref, span in wanted}:
            continue
        with target.transaction():
            if now:
                target.registry.decertify(collection, kind, Timespan(None, None))
            for ref, span in wanted:
                target.registry.certify(collection, [ref], span)


def _looks(
    name: str, clock: str, state: dict[str, Any] | None, horizon_tai: float
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Conditions under which something may be new: the horizon passed it, or it came since.

    Neither reads what is not released yet, of which a large camera has half a million files.
    """
    from astropy.time import Time
    from lsst.daf.butler import Timespan

    def tai(seconds: float) -> Time:
        return Time(max(seconds, 0.0), format="unix_tai", scale="tai")

    horizon = tai(horizon_tai + 1.0)
    old = f"{clock}.timespan OVERLAPS :past" if clock else ""
    past = {"past": Timespan(None, horizon)} if clock else {}
    if state is None:
        return [(old, past)]
    late = f"{name}.ingest_date > :looked" + (f" AND {old}" if clock else "")
    out: list[tuple[str, dict[str, Any]]] = [(late, past | {"looked": tai(state["looked_tai"])})]
    if clock and state["horizon_tai"] < horizon_tai:
        passed = Timespan(tai(state["horizon_tai"] - 1.0), horizon)
        out.append((f"{clock}.timespan OVERLAPS :span", {"span": passed}))
    return out


def _began_before(ref: DatasetRef, clock: str, horizon_tai: float) -> bool:
    record = ref.dataId.records[clock]
    span = None if record is None else record.timespan
    if span is None or span.begin is None:
        return False
    # a visit is released with the last of its exposures
    edge = span.end if clock == "visit" and span.end is not None else span.begin
    return bool(edge.unix_tai <= horizon_tai)
