"""From the outbox in the database to the alert stream: in order, at least once."""

from __future__ import annotations

import logging
import time

from cumbre.alerts.packet import lite_packet
from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.errors import BadFileError
from cumbre.core.time import Clock
from cumbre.stores.postgres import Database

log = logging.getLogger(__name__)

TOPIC, LITE = "Alerts.packet", "Alerts.lite"
_BATCH = 50
_POLL_S = 0.1
_NEXT = """
SELECT sequence, alert_id, visit, detector, packet FROM level1.alert_outbox
WHERE sent_tai IS NULL ORDER BY sequence LIMIT %s
"""
_MARK = "UPDATE level1.alert_outbox SET sent_tai = %s WHERE sequence = ANY(%s) AND sent_tai IS NULL"
_FINISHED = """
SELECT v.visit, v.detector, v.n_alerts, i.instrument, i.group_id, e.obs_ids, e.numbers,
       (SELECT max(h.detector_name) FROM ledger.hop h
        WHERE h.obs_id = i.obs_id AND h.detector = v.detector) AS detector_name
FROM level1.visit_detector v
JOIN LATERAL (SELECT * FROM ledger.image WHERE exposure_id = v.visit ORDER BY obs_id LIMIT 1) i ON TRUE
-- the exposures that the result was made of; where there may be several, when the ledger knows which
JOIN LATERAL (
    SELECT array_agg(o.obs_id ORDER BY o.obs_id) FILTER (WHERE o.obs_id = i.obs_id OR p.obs_id IS NOT NULL) AS obs_ids,
           array_agg(o.exposure_id ORDER BY o.obs_id) FILTER (WHERE o.obs_id = i.obs_id OR p.obs_id IS NOT NULL)
           AS numbers, count(*) AS n, count(p.obs_id) AS n_known
    FROM ledger.image o LEFT JOIN ledger.hop p
        ON p.obs_id = o.obs_id AND p.detector = v.detector AND p.hop = 'processed' AND p.outcome = 'ok'
    WHERE coalesce(o.visit, o.exposure_id) = v.visit AND o.instrument = i.instrument) e ON e.n = 1 OR e.n_known > 0
WHERE v.alerted_tai IS NULL AND NOT EXISTS (
    SELECT FROM level1.alert_outbox o
    WHERE o.visit = v.visit AND o.detector = v.detector AND o.sent_tai IS NULL)
ORDER BY v.stored_tai LIMIT %s
"""
_REPORTED = "UPDATE level1.visit_detector SET alerted_tai = %s WHERE visit = %s AND detector = %s"


class OutboxRelay:
    """Publishes what prompt processing left in ``level1.alert_outbox``, whole and without pictures and history.

    A packet is marked as sent after the bus has it; a relay killed in between publishes it again, so readers
    drop repeats by ``diaSourceId``. When the last alert of a detector is out, the hop ``alerted`` says so.
    Detectors without alerts get their hop too.
    """

    name = "alerts"

    def __init__(self, *, site: Site, bus: Bus, db: Database, clock: Clock | None = None) -> None:
        del site  # every service is made with the same arguments
        self._bus = bus
        self._db = db
        self._clock = clock or bus.clock
        self._ready = False

    def step(self, timeout_s: float) -> int:
        """Publish what waits; looks again for at most ``timeout_s`` real seconds when nothing does.

        Returns
        -------
        int
            Packets published and detectors reported.

        Raises
        ------
        TransientError
            The database is not there; nothing is lost, call again.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            handled = self._relay_batch() + self._report_detectors() if self._prepared() else 0
            left = deadline - time.monotonic()
            if handled or left <= 0:
                return handled
            time.sleep(min(_POLL_S, left))

    def close(self) -> None:
        """Release the database."""
        self._db.close()

    def _prepared(self) -> bool:
        """Tell whether Level 1 and the ledger have made their tables."""
        if not self._ready:
            found = "SELECT to_regclass('level1.alert_outbox'), to_regclass('ledger.image')"
            self._ready = None not in self._db.execute(found)[0]
        return self._ready

    def _relay_batch(self) -> int:
        rows = self._db.query(_NEXT, (_BATCH,))
        packets = [(str(row["alert_id"]), bytes(row["packet"])) for row in rows]
        if packets:
            self._bus.publish_many_bytes((TOPIC, key, packet) for key, packet in packets)
            light = [(LITE, key, small) for key, packet in packets if (small := _lite(packet))]
            self._bus.publish_many_bytes(light)
            self._db.execute(_MARK, (self._clock.now_tai_s(), [row["sequence"] for row in rows]))
        return len(rows)

    def _report_detectors(self) -> int:
        """Publish the hop of each detector whose alerts are all out, once the ledger knows its image."""
        rows = self._db.query(_FINISHED, (_BATCH,))
        for row in rows:
            now = self._clock.now_tai_s()
            hop = {
                "instrument": row["instrument"], "groupId": row["group_id"], "detector": row["detector"],
                "detectorName": row["detector_name"] or "", "hop": "alerted", "outcome": "ok",
                "place": "stream", "message": f"{row['n_alerts']} alerts", "hopTai": now,
            }  # fmt: skip
            self._bus.publish_many(
                ("Image.hop", hop | {"obsId": obs_id, "exposureId": number})
                for obs_id, number in zip(row["obs_ids"], row["numbers"], strict=True)
            )
            self._db.execute(_REPORTED, (now, row["visit"], row["detector"]))
        return len(rows)


def _lite(packet: bytes) -> bytes | None:
    """The lite packet; None for one that cannot be read, which only the whole stream carries."""
    try:
        return lite_packet(packet)
    except BadFileError as error:
        log.warning("an alert has no lite packet: %s", error)
        return None
