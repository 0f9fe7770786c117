"""From predicted targets and announced visits to the rows of ``ivoa.obsplan``.

A target is planned while the scheduler predicts it, scheduled when its visit is announced, performed when the ledger
knows its exposures. Its identifier is made of camera, night and the scheduler's number of the target: the visit that
is announced for it has the same number, so the row stays the same from the plan to the exposure.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cumbre.core.errors import CumbreError
from cumbre.core.instrument import Instrument
from cumbre.core.time import day_obs_from_tai
from cumbre.stores.postgres import Database

if TYPE_CHECKING:
    from cumbre.bus import Bus

log = logging.getLogger(__name__)

PREDICTED = "Scheduler.predictedSchedule"
NEXT_VISIT, CANCELLED = "ScriptQueue.nextVisit", "ScriptQueue.nextVisitCanceled"
_COLUMNS = (
    "plan_id", "group_id", "announced_tai", "start_tai", "duration_s", "exposures", "instrument", "survey", "filter",
    "ra", "dec", "rotation", "region", "fov_deg", "em_min", "em_max",
)  # fmt: skip
_STORE = f"""INSERT INTO access.plan ({", ".join(f'"{name}"' for name in _COLUMNS)})
    VALUES ({", ".join(f"%({name})s" for name in _COLUMNS)})
    ON CONFLICT (plan_id) DO UPDATE SET {", ".join(f'"{n}" = excluded."{n}"' for n in _COLUMNS if n != "plan_id")}
    WHERE access.plan.group_id IS NULL RETURNING 1"""  # noqa: S608 (names are ours)


class PlanKeeper:
    """Stores every predicted and announced visit; goes on where it stopped.

    Parameters
    ----------
    bus
        Of the site.
    db
        Database with ``access.plan``.
    instruments
        By name.
    """

    def __init__(self, bus: Bus, db: Database, instruments: Mapping[str, Instrument]) -> None:
        self._db, self._instruments = db, instruments
        self._visits = bus.subscribe(
            [PREDICTED, NEXT_VISIT, CANCELLED], start="earliest", consumer="access-plan"
        )

    def step(self) -> int:
        """Store what came; returns how many messages."""
        messages = self._visits.poll(timeout_s=0, limit=500)
        for message in messages:
            if message.topic == CANCELLED:
                self._db.execute(
                    "UPDATE access.plan SET cancelled = true WHERE group_id = %s",
                    (message.fields["groupId"],),
                )
                continue
            try:
                if message.topic == PREDICTED:
                    self._predicted(message.fields, message.snd_tai)
                else:
                    self._announced(message.fields, message.snd_tai)
            except CumbreError as error:
                log.warning("%s is not in the plan: %s", message.topic, error)
        if messages:
            self._visits.commit()
        return len(messages)

    def _predicted(self, told: Mapping[str, Any], now_tai: float) -> None:
        """A prediction replaces the one before; what was announced meanwhile stays as it was announced."""
        rows = [
            self._row(
                told["instrument"], number, told["startTai"][i], now_tai, ra=told["ra"][i], dec=told["decl"][i],
                rotation=told["rotation"][i], filter_name=told["filter"][i],
                duration_s=(told["duration"] or told["exposureTime"])[i], survey=told["survey"][i],
            ) | {"exposures": told["nimages"][i] if told["nimages"] else None}
            for i, number in enumerate(told["targetId"])
        ]  # fmt: skip
        with self._db.connection() as link:
            link.execute(
                "DELETE FROM access.plan WHERE group_id IS NULL AND instrument = %s AND plan_id <> ALL(%s)",
                (told["instrument"], [row["plan_id"] for row in rows]),
            )
            for row in rows:
                link.execute(_STORE.encode(), row)

    def _announced(self, visit: Mapping[str, Any], now_tai: float) -> None:
        ra, dec = (float(v) for v in visit["position"][:2])
        row = self._row(
            visit["instrument"], visit["scriptSalIndex"], visit["startTime"], now_tai, ra=ra, dec=dec,
            rotation=visit["cameraAngle"], filter_name=visit["filters"], duration_s=visit["duration"],
            survey=visit["survey"],
        ) | {"group_id": visit["groupId"], "exposures": visit["nimages"]}  # fmt: skip
        if self._db.execute("SELECT 1 FROM access.plan WHERE group_id = %s", (visit["groupId"],)):
            return
        if not self._db.execute(_STORE, row):
            # a queue that counts from one again: the number of that night is taken
            self._db.execute(_STORE, row | {"plan_id": visit["groupId"]})

    def _row(
        self, camera: str, number: int, start_tai: float, told_tai: float, *, ra: float, dec: float, rotation: float,
        filter_name: str, duration_s: float, survey: str,
    ) -> dict[str, Any]:  # fmt: skip
        from cumbre.core.geometry import field_radius_deg, sky_from_focal_plane

        instrument = self._instruments.get(camera)
        region = fov = None
        band: tuple[float, float] | None = None
        if instrument is not None:
            fov = 2 * field_radius_deg(instrument)
            half = max(
                max(abs(d.x_offset_mm) + d.nx * d.pixel_mm / 2, abs(d.y_offset_mm) + d.ny * d.pixel_mm / 2)
                for d in instrument.detectors
            )
            # counter-clockwise on the sky, east to the left: +x is west at parity 1
            x, y = [half, half, -half, -half], [-half, half, half, -half]
            if instrument.parity < 0:
                x = [-v for v in x]
            corners = sky_from_focal_plane(instrument, ra, dec, float(rotation), x, y)
            region = [float(v) for pair in zip(*corners, strict=True) for v in pair]
            band = next((f.wavelength_nm for f in instrument.filters if f.name == filter_name), None)
        return {
            "plan_id": f"{camera}-{day_obs_from_tai(start_tai)}-{number}", "group_id": None,
            "announced_tai": told_tai, "start_tai": start_tai, "duration_s": duration_s, "exposures": None,
            "instrument": camera, "survey": survey, "filter": filter_name, "ra": ra, "dec": dec, "rotation": rotation,
            "region": region, "fov_deg": fov, "em_min": band and band[0] * 1e-9, "em_max": band and band[1] * 1e-9,
        }  # fmt: skip
