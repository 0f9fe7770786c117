"""From announced visits to the rows of ``ivoa.obsplan``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cumbre.core.errors import CumbreError
from cumbre.core.instrument import Instrument
from cumbre.stores.postgres import Database

if TYPE_CHECKING:
    from cumbre.bus import Bus

log = logging.getLogger(__name__)

NEXT_VISIT, CANCELLED = "ScriptQueue.nextVisit", "ScriptQueue.nextVisitCanceled"


class PlanKeeper:
    """Stores every announced visit; goes on where it stopped.

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
        self._visits = bus.subscribe([NEXT_VISIT, CANCELLED], start="earliest", consumer="access-plan")

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
                self._store(message.fields, message.snd_tai)
            except CumbreError as error:
                log.warning("visit %s is not in the plan: %s", message.fields.get("groupId"), error)
        if messages:
            self._visits.commit()
        return len(messages)

    def _store(self, visit: Mapping[str, Any], announced_tai: float) -> None:
        from cumbre.core.geometry import field_radius_deg, sky_from_focal_plane

        instrument = self._instruments.get(visit["instrument"])
        region = fov = None
        band: tuple[float, float] | None = None
        ra, dec = (float(v) for v in visit["position"][:2])
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
            corners = sky_from_focal_plane(instrument, ra, dec, float(visit["cameraAngle"]), x, y)
            region = [float(v) for pair in zip(*corners, strict=True) for v in pair]
            band = next((f.wavelength_nm for f in instrument.filters if f.name == visit["filters"]), None)
        self._db.execute(
            "INSERT INTO access.plan (group_id, announced_tai, start_tai, duration_s, exposures, instrument, survey,"
            ' filter, ra, "dec", rotation, region, fov_deg, em_min, em_max)'
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (group_id) DO NOTHING",
            (
                visit["groupId"], announced_tai, visit["startTime"], visit["duration"], visit["nimages"],
                visit["instrument"], visit["survey"], visit["filters"], ra, dec, visit["cameraAngle"], region, fov,
                band and band[0] * 1e-9, band and band[1] * 1e-9,
            ),
        )  # fmt: skip
