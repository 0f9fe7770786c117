"""Templates of the archived visits of a site: measured, chosen, resampled, averaged, stored.

A visit is measured and resampled once. A later run takes what is new, chooses again among all visits, and averages the
resampled images: the result is the same as if all had been there at once. What a killed run had done stays done.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import cumbre
from cumbre.core import geometry
from cumbre.core.errors import CumbreError, NotFoundError, NoWorkFoundError, TransientError, UserError
from cumbre.core.geometry import approximate_wcs
from cumbre.core.instrument import Detector, Instrument
from cumbre.orchestration.inputs import MATCH_CENTRE_PART, Field, InputLoader, airmass_at
from cumbre.orchestration.template_choice import Candidate, Choice, Refused, choose
from cumbre.orchestration.templates import Place, StoredWarp, TemplateStore, one_maker
from cumbre.stores.files import sha256_of, write_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cumbre.bus import Bus
    from cumbre.core.configuration import Site, Templates
    from cumbre.core.time import Clock
    from cumbre.payloads.exposure import Exposure
    from cumbre.stores.postgres import Database

MARGIN_PX = 48
"""A template is wider than the detector on each side, so that a dithered visit still lies inside."""
LEAST_OVERLAP = 0.1
"""Part of a template's grid that an image must cover to take part."""
SURVEY = "survey.json"
MEASURED = "measured"
NEEDED = ("seeing", "zeroPoint", "skyLevel", "limitingMagnitude")
QUALITY = (*NEEDED, "maskedFraction", "psfEllipticity", "astrometricRms")
"""Fields of Prompt.visitQuality that the choice looks at; without the needed ones an image is measured here."""
log = logging.getLogger(__name__)
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Frame:
    """One detector image of an archived visit."""

    obs_id: str
    visit: int
    begin_tai: float
    exposure_s: float
    ra: float
    dec: float
    rotation: float
    band: str
    detector: str
    problem: str
    raws: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What goes into the templates of one place."""

    place: Place
    choices: tuple[Choice, ...]
    outside: tuple[Refused, ...]


class TemplateMaker:
    """Makes the templates of a site.

    Parameters
    ----------
    site
        With calibrations and reference stars.
    db
        With the ledger.
    instrument
        The camera that prompt processing serves.
    say
        Called with a line for everything that takes a while.
    rules
        The site's when None.
    bus
        With the quality that prompt processing told; without it visits are calibrated to be measured.

    The ledger is read once: a maker knows the visits that were there when it was asked first.
    """

    def __init__(
        self,
        site: Site,
        db: Database,
        clock: Clock,
        instrument: Instrument,
        *,
        say: Say,
        rules: Templates | None = None,
        bus: Bus | None = None,
    ) -> None:
        self._site, self._db, self._clock, self._camera, self._say = site, db, clock, instrument, say
        self._rules = rules or site.config.templates
        self.store = TemplateStore(site.root)
        self._loader = InputLoader(site.root)
        self._bus = bus

    # what there is

    def places(
        self, *, tiles: Sequence[str] = (), bands: Sequence[str] = (), detectors: Sequence[str] = ()
    ) -> list[Place]:
        """Fields, bands and detectors with archived visits; empty filters let everything through.

        Raises
        ------
        UserError
            No visit is of such a field, band or detector; the message lists those that there are.
        """
        out, assigned = {}, list(self._assigned())
        for what, asked_for, known in (
            ("field", tiles, {tile for tile, *_ in assigned}),
            ("band", bands, {frame.band for *_, frame in assigned}),
            ("detector", detectors, {frame.detector for *_, frame in assigned}),
        ):
            strange = sorted(set(asked_for) - known)
            if strange and known:
                raise UserError(
                    f"no visit at the archive is of {what} {', '.join(strange)}; expected {', '.join(sorted(known))}"
                )
        for tile, ra, dec, frame in assigned:
            place = Place(tile, ra, dec, frame.band, frame.detector)
            asked = ((tiles, tile), (bands, frame.band), (detectors, frame.detector))
            if all(not wanted or value in wanted for wanted, value in asked):
                out[tile, frame.band, frame.detector] = place
        return [out[key] for key in sorted(out)]

    @cached_property
    def _frames(self) -> list[Frame]:
        """Science images at the archive, the exposures of one visit together."""
        rows = self._db.query(
            "SELECT i.obs_id, i.begin_tai, i.exposure_s, i.ra, i.dec, i.rotation, i.band, h.detector_name, h.path,"
            " coalesce(i.visit, i.exposure_id) AS visit,"
            " CASE WHEN p.outcome = 'UnprocessableData' THEN left(p.message, 300) END AS problem"
            " FROM ledger.image i JOIN ledger.hop h USING (obs_id)"
            " LEFT JOIN ledger.hop p ON p.obs_id = h.obs_id AND p.detector = h.detector AND p.hop = 'processed'"
            " AND p.place = 'archive'"
            " WHERE h.hop = 'at_archive' AND h.outcome = 'ok' AND i.instrument = %s AND h.detector >= 0"
            " AND upper(i.image_type) IN ('OBJECT', 'SCIENCE') AND i.ra IS NOT NULL AND i.dec IS NOT NULL"
            " AND i.band IS NOT NULL AND i.begin_tai IS NOT NULL ORDER BY i.begin_tai, i.obs_id",
            (self._camera.name,),
        )
        visits: dict[tuple[Any, str], Frame] = {}
        for row in rows:
            key, path = (row["visit"], row["detector_name"]), Path(row["path"])
            exposure_s = row["exposure_s"] or 0.0
            problem = (
                f"prompt processing: UnprocessableData: {row['problem']}"
                if row["problem"] is not None
                else ""
            )
            if key in visits:
                first = visits[key]
                visits[key] = replace(
                    first, raws=(*first.raws, path), exposure_s=first.exposure_s + exposure_s,
                    problem=first.problem or problem,
                )  # fmt: skip
                continue
            visits[key] = Frame(
                row["obs_id"], int(row["visit"] or 0), float(row["begin_tai"]), float(exposure_s), float(row["ra"]),
                float(row["dec"]), float(row["rotation"] or 0.0), row["band"], row["detector_name"], problem, (path,),
            )  # fmt: skip
        return list(visits.values())

    @cached_property
    def _by_band(self) -> dict[str, tuple[list[Frame], NDArray[np.float64], NDArray[np.float64]]]:
        """Images of each band, and their pointings."""
        out = {}
        for band in {frame.band for frame in self._frames}:
            mine = [frame for frame in self._frames if frame.band == band]
            out[band] = mine, np.array([f.ra for f in mine]), np.array([f.dec for f in mine])
        return out

    @cached_property
    def _told(self) -> dict[tuple[int, int], dict[str, float]]:
        """Quality that prompt processing told, by visit and detector; the bus forgets it after some time."""
        out: dict[tuple[int, int], dict[str, float]] = {}
        for message in self._bus.replay(["Prompt.visitQuality"]) if self._bus is not None else ():
            numbers = {name: message.fields[name] for name in QUALITY}
            known = {name: float(value) for name, value in numbers.items() if math.isfinite(float(value))}
            if set(NEEDED) <= set(known) and message.fields["instrument"] == self._camera.name:
                out[int(message.fields["visit"]), int(message.fields["detector"])] = known
        return out

    def _assigned(self) -> Iterator[tuple[str, float, float, Frame]]:
        """Every image with its field: of the survey, or named after the first pointing there."""
        path = self._site.path(SURVEY)
        fields = (
            [(str(t["name"]), float(t["ra"]), float(t["dec"])) for t in json.loads(path.read_text())]
            if path.exists()
            else []
        )
        science = {d.name: d for d in self._camera.detectors if d.purpose == "SCIENCE"}
        for frame in self._frames:
            detector = science.get(frame.detector)
            if detector is None:
                continue
            reach = (
                MATCH_CENTRE_PART
                * self._camera.pixel_scale(detector)
                / 3600.0
                * min(detector.nx, detector.ny)
            )
            near = None
            if fields:
                away = geometry.separation_deg(
                    frame.ra, frame.dec, [f[1] for f in fields], [f[2] for f in fields]
                )
                near = int(np.argmin(away)) if float(np.min(away)) <= reach else None
            if near is None:
                fields.append((f"f{frame.ra:.4f}{frame.dec:+.4f}", frame.ra, frame.dec))
                near = len(fields) - 1
            yield (*fields[near], frame)

    def _frames_of(self, place: Place) -> list[Frame]:
        """Images that cover part of a place's grid; with another rotation another detector may be there."""
        detector = self._camera.detector(place.detector)
        x, y = np.meshgrid(np.linspace(0, detector.nx - 1, 8), np.linspace(0, detector.ny - 1, 8))
        ra, dec = geometry.sky_from_pixel(
            self._camera, detector, place.ra, place.dec, 0.0, x.ravel(), y.ravel()
        )
        reach = 2 * geometry.field_radius_deg(self._camera)
        frames, ras, decs = self._by_band.get(place.band, ([], np.zeros(0), np.zeros(0)))
        near = geometry.separation_deg(ras, decs, place.ra, place.dec) <= reach
        out = []
        for frame in (frames[k] for k in np.flatnonzero(near)):
            other = self._camera.detector(frame.detector)
            px, py = geometry.pixel_from_sky(
                self._camera, other, frame.ra, frame.dec, frame.rotation, ra, dec
            )
            inside = (px > 0) & (py > 0) & (px < other.nx - 1) & (py < other.ny - 1)
            if float(inside.mean()) >= LEAST_OVERLAP:
                out.append(frame)
        return out

    # measuring and choosing

    def decide(self, place: Place) -> Decision:
        """Measure what was not, and choose; nothing but measurements is stored."""
        frames = {f"{f.obs_id}_{f.detector}": f for f in self._frames_of(place)}
        candidates = [self._candidate(place, name, frame) for name, frame in frames.items()]
        choices, outside = choose(candidates, self._rules)
        return Decision(place, tuple(choices), tuple(outside))

    def _candidate(self, place: Place, name: str, frame: Frame) -> Candidate:
        airmass = airmass_at(self._site.root, frame.begin_tai, frame.ra, frame.dec)
        if frame.problem:
            return Candidate(name, airmass, problem=frame.problem)
        if not self.store.warp_path(place, name).is_file() and not all(path.is_file() for path in frame.raws):
            return Candidate(name, airmass, problem="its raw file is not in the archive's cache any more")
        told = self._measured(place, frame)
        if "problem" in told:
            return Candidate(name, airmass, problem=told["problem"])
        rate = max(frame.exposure_s, 1e-3)
        return Candidate(
            name, airmass, seeing_arcsec=told.get("seeing", math.nan), zero_point=told.get("zeroPoint", math.nan),
            sky_rate=told.get("skyLevel", math.nan) / rate, depth_mag=told.get("limitingMagnitude", math.nan),
            masked=told.get("maskedFraction", 0.0), ellipticity=told.get("psfEllipticity", 0.0),
            astrometry_arcsec=told.get("astrometricRms", 0.0),
        )  # fmt: skip

    def _measured(self, place: Place, frame: Frame) -> dict[str, Any]:
        """Quality of an image: kept, told by prompt processing, or measured by calibrating it, which resamples it too."""
        path = self._measured_path(place, frame)
        if path.is_file():
            known: dict[str, Any] = json.loads(path.read_bytes())
            if "problem" not in known or known["software"] == cumbre.__version__:
                return known
        told: dict[str, Any] | None = self._told.get((frame.visit, self._camera.detector(frame.detector).id))
        if told is not None:
            return self._keep(path, told)
        try:
            return self._keep(path, self._resampled(place, frame)[1])
        except (TransientError, NotFoundError):
            raise
        except CumbreError as error:
            return self._keep(path, _problem(error))

    def _measured_path(self, place: Place, frame: Frame) -> Path:
        folder = self.store.folder / MEASURED / place.tile / f"{place.band}_{place.detector}"
        return folder / f"{frame.obs_id}_{frame.detector}.json"

    def _keep(self, path: Path, told: dict[str, Any]) -> dict[str, Any]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(told, allow_nan=False).encode())
        return told

    # making

    def make(self, place: Place) -> list[dict[str, Any]]:
        """Bring the templates of a place up to date; entries of those that are new.

        Raises
        ------
        NotFoundError
            No calibrations or reference stars.
        """
        with one_maker(self.store.folder):
            return self._make(place)

    def _make(self, place: Place) -> list[dict[str, Any]]:
        decision = self.decide(place)
        while not self._all_resampled(place, decision):
            decision = self.decide(place)
        made, used = [], []
        for choice in decision.choices:
            known = self.store.versions(place, choice.low)
            names = [one.obs_id for one in choice.chosen]
            if not names or (known and [i["name"] for i in known[-1]["inputs"]] == names):
                if known:
                    self.store.list_again(known[-1])
                    used += [self._path(place, i["name"]) for i in known[-1]["inputs"]]
                continue
            made.append(self._average(place, choice, decision.outside))
            used += [self._path(place, name) for name in names]
        self.store.drop_warps(place, used)
        return made

    def _all_resampled(self, place: Place, decision: Decision) -> bool:
        """Resample what was chosen; False when one could not be: that is kept, and the choice is another then."""
        frames = {f"{f.obs_id}_{f.detector}": f for f in self._frames_of(place)}
        for one in (one for choice in decision.choices for one in choice.chosen):
            try:
                self._resampled(place, frames[one.obs_id])
            except (TransientError, NotFoundError):
                raise
            except CumbreError as error:
                self._keep(self._measured_path(place, frames[one.obs_id]), _problem(error))
                return False
        return True

    def _path(self, place: Place, name: str) -> Path:
        return self.store.warp_path(place, name)

    def _average(self, place: Place, choice: Choice, outside: Sequence[Refused]) -> dict[str, Any]:
        from cumbre.payloads.coadd import combine

        frames = {f"{f.obs_id}_{f.detector}": f for f in self._frames_of(place)}
        warps = []
        for one in choice.chosen:
            warp, _ = self._resampled(place, frames[one.obs_id])
            warps.append(warp)
        wcs, shape = self._grid(place)
        if any(warp.shape != shape for warp in warps):
            raise NoWorkFoundError(f"template {place.tile} {place.band} {place.detector}: its grid changed")
        template = combine(warps, wcs)
        whole = sum(warp.share for warp in warps)
        inputs = [
            {
                "name": one.obs_id,
                "obs_id": frames[one.obs_id].obs_id,
                "weight": warp.share / whole,
                "airmass": one.airmass,
                "seeing": one.seeing_arcsec,
                "depth": one.depth_mag,
                **warp.made_of,
            }
            for one, warp in zip(choice.chosen, warps, strict=True)
        ]
        about = {
            "inputs": inputs,
            "refused": [{"name": r.obs_id, "reason": r.reason} for r in (*choice.refused, *outside)],
            "rules": self._rules.model_dump(),
            "software": cumbre.__version__,
        }
        row = self.store.publish(
            place, (choice.low, choice.high), template, about, made_tai=self._clock.now_tai_s()
        )
        self._say(
            f"{place.tile} {place.band} {place.detector} airmass {choice.low:g}-{choice.high:g}: {row['version']} of "
            f"{len(warps)} visits, {template.metrics['coverage']:.0%} covered"
        )
        return row

    def _grid(self, place: Place) -> tuple[Any, tuple[int, int]]:
        from cumbre.payloads.kernels.wcs import PlaneWcs

        detector = self._camera.detector(place.detector)
        header = approximate_wcs(self._camera, detector, place.ra, place.dec, 0.0)
        header |= {key: header[key] + MARGIN_PX for key in ("CRPIX1", "CRPIX2")}
        return PlaneWcs.from_header(header), (detector.ny + 2 * MARGIN_PX, detector.nx + 2 * MARGIN_PX)

    def _resampled(self, place: Place, frame: Frame) -> tuple[StoredWarp, dict[str, Any]]:
        """The image on the place's grid, made when it is not kept, and its quality.

        Raises
        ------
        NoWorkFoundError
            It does not reach the grid, or has no stars.
        UnprocessableDataError, BadFileError
            It cannot be calibrated.
        """
        from cumbre.payloads.alert_production import exposure_quality
        from cumbre.payloads.coadd import resample

        path = self._path(place, f"{frame.obs_id}_{frame.detector}")
        if path.is_file():
            kept = StoredWarp.open(path)
            return kept, kept.made_of["quality"]
        self._say(f"{place.tile} {place.band} {place.detector}: {frame.obs_id} {frame.detector}")
        exposure, made_of = self._calibrated(frame)
        quality = exposure_quality(exposure, frame.exposure_s)
        warp = resample(exposure, *self._grid(place))
        if warp is None:
            raise NoWorkFoundError(f"{frame.obs_id} {frame.detector} does not reach the field {place.tile}")
        return self.store.save_warp(path, warp, made_of | {"quality": quality}), quality

    def _calibrated(self, frame: Frame) -> tuple[Exposure, dict[str, Any]]:
        """The visit's calibrated image, and what it was made of."""
        from cumbre.payloads.isr import assemble_and_correct
        from cumbre.payloads.raw import read_raw
        from cumbre.payloads.snaps import calibrate_snaps

        detector: Detector = self._camera.detector(frame.detector)
        field = Field.predict(self._camera, detector, frame.ra, frame.dec, rotation=frame.rotation)
        inputs = self._loader.load_for_template(self._camera, detector, field, frame.band)
        snaps = [
            assemble_and_correct(read_raw(path, self._camera), inputs.calibrations) for path in frame.raws
        ]
        exposure = calibrate_snaps(snaps, inputs.reference, instrument=self._camera)
        return exposure, {
            "raws": [{"name": path.name, "sha256": sha256_of(path)} for path in frame.raws],
            "calibrations": inputs.files["calibrations"],
            "reference": inputs.files["reference"],
        }


def _problem(error: CumbreError) -> dict[str, str]:
    return {"problem": f"{error.outcome}: {error}", "software": cumbre.__version__}
