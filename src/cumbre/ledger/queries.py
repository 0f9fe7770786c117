"""Questions to the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cumbre.core.errors import NotFoundError
from cumbre.ledger.schema import COPY_HOPS, HOPS, VISIT_HOPS
from cumbre.stores.files import normal_checksum
from cumbre.stores.postgres import Database

_WORDS = {
    "exposed": "exposed", "read_out": "read out of the camera", "header": "header made",
    "written": "written at the summit", "buffered": "in the outage buffer", "at_base": "at the base",
    "base_tape": "on tape at the base", "sent": "sent to the archive", "at_archive": "at the archive",
    "archive_tape": "on tape at the archive", "ingested_oods": "in the summit repository",
    "ingested_embargo": "in the embargo repository", "preloaded": "prepared for prompt processing",
    "processed": "processed", "alerted": "its alerts sent",
}  # fmt: skip


class Ledger:
    """The ledger as its readers see it."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def image(self, obs_id: str) -> dict[str, Any]:
        """One image's record.

        Raises
        ------
        NotFoundError
            The ledger never heard of it.
        """
        rows = self._db.query("SELECT * FROM ledger.image WHERE obs_id = %s", (obs_id,))
        if not rows:
            raise NotFoundError(f"{obs_id}: not in the ledger; no event of the camera or a service names it")
        return rows[0]

    def where(self, obs_id: str, detector: int | None = None) -> list[dict[str, Any]]:
        """Every hop and copy of an image (or one detector of it), in order of time."""
        return self._db.query(
            "SELECT detector, detector_name, hop, outcome, place, path, byte_size, checksum, message, hop_tai,"
            " recv_tai, attempt FROM ledger.hop WHERE obs_id = %s"
            " AND (%s::int IS NULL OR detector = %s) ORDER BY detector, hop_tai, hop",
            (obs_id, detector, detector),
        )

    def history(self, obs_id: str) -> list[dict[str, Any]]:
        """Every attempt ever reported of an image, in order of time."""
        return self._db.query(
            "SELECT * FROM ledger.hop_history WHERE obs_id = %s ORDER BY hop_tai, detector, hop", (obs_id,)
        )

    def missing(self, place: str) -> list[dict[str, Any]]:
        """Detector images that were read out and have no verified copy at ``place``, oldest first.

        One row a detector image: obs_id, detector, last_hop, last_outcome, last_message, read_out_tai.
        """
        return self._db.query(
            """
            SELECT r.obs_id, r.detector, s.detector_name, s.last_hop, s.last_outcome, s.last_message,
                   min(r.hop_tai) AS read_out_tai
            FROM ledger.hop r JOIN ledger.status s USING (obs_id, detector)
            WHERE r.hop IN ('read_out', 'written') AND r.outcome = 'ok' AND r.detector >= 0
              AND NOT EXISTS (
                SELECT FROM ledger.hop c WHERE c.obs_id = r.obs_id AND c.detector = r.detector
                  AND c.outcome = 'ok' AND (c.place = %(place)s OR c.hop = %(place)s)
                  AND c.hop = ANY(%(hops)s))
            GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY read_out_tai, r.obs_id, r.detector
            """,
            {"place": place, "hops": list(COPY_HOPS)},
        )

    def owed(
        self,
        source: str,
        target: str,
        *,
        before_tai: float,
        since_tai: float = 0.0,
        after: tuple[int, int, str, int] = (0, 0, "", -1),
        limit: int = 2000,
    ) -> list[dict[str, Any]]:
        """Detector images that came to ``source`` in a range of time and have no verified copy at ``target``.

        A copy with another checksum than the source's is none.

        Parameters
        ----------
        after
            (day_obs, seq_num, obs_id, detector) of the last row of the page before.

        Returns
        -------
        list of dict
            Oldest first; one row each: obs_id, detector, detector_name, instrument, group_id, image_type,
            day_obs, seq_num, came_tai; path, byte_size and checksum of the copy at the source (None when the
            ledger knows of none: an image that is in the camera's store only); written, the outcome at the
            image writer (None when it never spoke).
        """
        return self._db.query(
            """
            SELECT h.obs_id, h.detector, max(h.detector_name) AS detector_name, i.instrument, i.group_id,
                   i.image_type, coalesce(i.day_obs, 0) AS day_obs, coalesce(i.seq_num, 0) AS seq_num,
                   min(h.hop_tai) AS came_tai,
                   max(h.path) FILTER (WHERE h.hop IN ('written', %(arrived)s)) AS path,
                   max(h.byte_size) FILTER (WHERE h.hop IN ('written', %(arrived)s)) AS byte_size,
                   max(nullif(h.checksum, '')) FILTER (WHERE h.hop <> 'read_out') AS checksum,
                   (SELECT max(w.outcome) FROM ledger.hop w WHERE w.obs_id = h.obs_id
                    AND w.detector = h.detector AND w.hop = 'written') AS written
            FROM ledger.hop h JOIN ledger.image i USING (obs_id)
            WHERE h.detector >= 0 AND h.hop_tai BETWEEN %(since)s AND %(before)s AND h.outcome = 'ok'
              AND (h.place = %(source)s AND h.hop = ANY(%(copies)s)
                   OR %(source)s = 'summit' AND h.hop = 'read_out')
              AND (coalesce(i.day_obs, 0), coalesce(i.seq_num, 0), h.obs_id, h.detector)
                  > (%(day)s, %(seq)s, %(obs)s, %(detector)s)
              AND NOT EXISTS (
                SELECT FROM ledger.hop c WHERE c.obs_id = h.obs_id AND c.detector = h.detector
                  AND c.outcome = 'ok' AND c.place = %(target)s AND c.hop = ANY(%(copies)s)
                  AND (h.hop = 'read_out' OR '' IN (c.checksum, h.checksum) OR lower(c.checksum) = lower(h.checksum)))
            GROUP BY h.obs_id, h.detector, i.instrument, i.group_id, i.image_type, i.day_obs, i.seq_num
            ORDER BY coalesce(i.day_obs, 0), coalesce(i.seq_num, 0), h.obs_id, h.detector LIMIT %(limit)s
            """,
            {
                "source": source, "target": target, "arrived": f"at_{source}", "before": before_tai,
                "since": since_tai, "copies": list(COPY_HOPS), "limit": limit,
                "day": after[0], "seq": after[1], "obs": after[2], "detector": after[3],
            },
        )  # fmt: skip

    def copies(self, hop: str) -> list[dict[str, Any]]:
        """Every detector image that a hop says to have a verified copy: obs_id, detector_name, checksum, path."""
        return self._db.query(
            "SELECT obs_id, detector_name, checksum, path FROM ledger.hop WHERE hop = %s AND outcome = 'ok'"
            " AND detector >= 0 ORDER BY obs_id, detector",
            (hop,),
        )

    def held(self, place: str, obs_ids: Sequence[str]) -> set[tuple[str, str]]:
        """(obs_id, detector name) of these images that have a verified copy at a place."""
        rows = self._db.execute(
            "SELECT obs_id, detector_name FROM ledger.hop WHERE obs_id = ANY(%s) AND place = %s"
            " AND outcome = 'ok' AND hop = ANY(%s)",
            (list(obs_ids), place, list(COPY_HOPS)),
        )
        return {(row[0], row[1]) for row in rows}

    def night(self, day_obs: int, tapes: Sequence[str] = ()) -> dict[str, Any]:
        """What became of one night's detector images, counted.

        Parameters
        ----------
        tapes
            Hops of the site's tapes; ``on_tape`` counts what is on all of them.
        """
        return self._db.query(
            """
            WITH d AS (
                SELECT h.obs_id, h.detector, bool_or(h.hop IN ('read_out', 'written') AND h.outcome = 'ok') AS taken,
                       bool_or(h.hop = 'written' AND h.outcome = 'ok') AS written,
                       bool_or(h.hop = 'at_base' AND h.outcome = 'ok') AS at_base,
                       bool_or(h.hop = 'at_archive' AND h.outcome = 'ok') AS at_archive,
                       count(DISTINCT h.hop) FILTER (WHERE h.hop = ANY(%(tapes)s) AND h.outcome = 'ok') AS tapes,
                       bool_or(h.outcome <> 'ok') AS failed,
                       bool_or(h.hop = 'at_archive' AND h.message LIKE 'shipped%%'
                               OR h.hop = 'at_base' AND h.message LIKE 'shipped%%') AS shipped
                FROM ledger.hop h JOIN ledger.image i USING (obs_id)
                WHERE i.day_obs = %(day)s AND h.detector >= 0 GROUP BY h.obs_id, h.detector)
            SELECT (SELECT count(*) FROM ledger.image WHERE day_obs = %(day)s) AS images,
                   count(*) FILTER (WHERE taken) AS expected, count(*) FILTER (WHERE written) AS written,
                   count(*) FILTER (WHERE at_base) AS at_base, count(*) FILTER (WHERE at_archive) AS at_archive,
                   count(*) FILTER (WHERE tapes = %(all)s) AS on_tape,
                   count(*) FILTER (WHERE taken AND NOT at_archive) AS missing,
                   (SELECT count(DISTINCT (x.obs_id, x.detector)) FROM ledger.hop_history x
                    JOIN ledger.image i USING (obs_id) WHERE i.day_obs = %(day)s AND x.hop = 'transmitted'
                      AND x.outcome = 'ok' AND x.message LIKE 'catch-up%%') AS resent,
                   count(*) FILTER (WHERE shipped) AS shipped, count(*) FILTER (WHERE failed) AS failed
            FROM d
            """,
            {"day": day_obs, "tapes": list(tapes), "all": len(tapes)},
        )[0]

    def nights(self, since_tai: float) -> list[int]:
        """Observing days of which something was reported after a time."""
        rows = self._db.execute(
            "SELECT DISTINCT i.day_obs FROM ledger.hop h JOIN ledger.image i USING (obs_id)"
            " WHERE h.hop_tai >= %s AND i.day_obs IS NOT NULL ORDER BY 1",
            (since_tai,),
        )
        return [int(row[0]) for row in rows]

    def why(self, obs_id: str) -> list[str]:
        """Sentences for people: for each detector the last hop reached, what failed, and how long ago.

        "Ago" is counted from the newest time that the ledger knows.

        Raises
        ------
        NotFoundError
            The ledger never heard of the image.
        """
        image = self.image(obs_id)
        rows = self.where(obs_id)
        newest = self._db.execute("SELECT max(hop_tai) FROM ledger.hop")[0][0] or 0.0
        detectors = sorted({row["detector"] for row in rows if row["detector"] >= 0})
        sentences = []
        expected = image["expected_detectors"]
        if not detectors:
            whole = [row for row in rows if row["detector"] < 0]
            sentences.append(_sentence(f"{obs_id} as a whole", whole, newest))
            sentences.append(f"No detector of {obs_id} was reported yet: the camera has not read it out.")
        elif expected is not None and len(detectors) < expected:
            sentences.append(f"{expected - len(detectors)} of {expected} detectors were never reported.")
        for detector in detectors:
            mine = [row for row in rows if row["detector"] == detector]
            name = max(row["detector_name"] for row in mine) or "without name"
            sentences.append(_sentence(f"Detector {detector} ({name})", mine, newest))
        return sentences

    def summary(self, day_obs: int | None = None) -> list[dict[str, Any]]:
        """One row an image (of an observing day): how many of its detectors passed each hop, and failures."""
        counts = ", ".join(
            f"count(DISTINCT h.detector) FILTER (WHERE h.hop = '{hop}' AND h.outcome = 'ok') AS {hop}"
            for hop in HOPS
            if hop not in ("exposed", "header", "preloaded", "buffered", "sent")
        )
        return self._db.query(
            "SELECT i.obs_id, i.day_obs, i.seq_num, i.image_type, i.band, i.exposure_s, "  # noqa: S608
            f"i.expected_detectors AS expected, {counts}, "
            "count(DISTINCT h.detector) FILTER (WHERE h.outcome <> 'ok') AS failed "
            "FROM ledger.image i LEFT JOIN ledger.hop h ON h.obs_id = i.obs_id AND h.detector >= 0 "
            "WHERE %s::int IS NULL OR i.day_obs = %s GROUP BY i.obs_id ORDER BY i.day_obs, i.seq_num",
            (day_obs, day_obs),
        )

    def latencies(self, from_hop: str, to_hop: str) -> list[dict[str, Any]]:
        """Night seconds from the first success of one hop to that of another, one row a detector image.

        What is made of a whole visit (``processed``, ``alerted``) counts from the last read-out of the visit's
        exposures. A hop that is only known of the whole image (``exposed``) counts for each of its detectors.
        """
        return self._db.query(
            """
            SELECT b.obs_id, b.detector, min(b.hop_tai) - CASE
                     WHEN a.hop = 'read_out' AND b.hop = ANY(%(visit_hops)s) THEN min(v.hop_tai) ELSE min(a.hop_tai)
                   END AS latency_s
            FROM ledger.hop b JOIN ledger.hop a ON a.obs_id = b.obs_id
              AND (a.detector = b.detector OR (a.detector = -1 AND NOT EXISTS (
                   SELECT FROM ledger.hop x WHERE x.obs_id = a.obs_id AND x.hop = a.hop AND x.detector >= 0)))
            LEFT JOIN ledger.visit_read_out v ON v.obs_id = b.obs_id AND v.detector = a.detector
            WHERE a.hop = %(from)s AND a.outcome = 'ok' AND b.hop = %(to)s AND b.outcome = 'ok' AND b.detector >= 0
            GROUP BY b.obs_id, b.detector, a.hop, b.hop ORDER BY b.obs_id, b.detector
            """,
            {"from": from_hop, "to": to_hop, "visit_hops": list(VISIT_HOPS)},
        )

    def may_delete(self, obs_id: str, detector: int, policy_places: Sequence[str]) -> bool:
        """Whether verified copies with one and the same checksum exist everywhere the policy asks for.

        Parameters
        ----------
        policy_places
            Places (``base``, ``archive``) or copy hops (``base_tape``); every one must hold a copy. An empty
            policy allows nothing.

        Notes
        -----
        A copy counts when its newest report is ok with a checksum and nothing was quarantined or deleted at
        its place since. If the writer's checksum is known, the copies must have that one.
        """
        if not policy_places:
            return False
        rows = self._newest(obs_id, detector)
        gone = [row for row in rows if row["hop"] in ("quarantined", "deleted", "dropped")]
        copies = [
            row for row in rows if row["hop"] in COPY_HOPS and row["outcome"] == "ok" and row["checksum"]
        ]
        checksums = {normal_checksum(row["checksum"]) for row in copies if row["hop"] == "written"}
        for place in policy_places:
            here = [
                row
                for row in copies
                if place in (row["place"], row["hop"]) and not any(_undoes(lost, row) for lost in gone)
            ]
            if not here:
                return False
            checksums |= {normal_checksum(row["checksum"]) for row in here}
        return len(checksums) == 1

    def _newest(self, obs_id: str, detector: int) -> list[dict[str, Any]]:
        """Give the newest report of each hop at each place (``ledger.hop`` keeps the time of the first)."""
        return self._db.query(
            "SELECT DISTINCT ON (hop, place) hop, outcome, place, path, checksum, hop_tai"
            " FROM ledger.hop_history WHERE obs_id = %s AND detector = %s"
            " ORDER BY hop, place, hop_tai DESC, (outcome = 'ok'), recv_tai DESC",
            (obs_id, detector),
        )


def _undoes(lost: dict[str, Any], copy: dict[str, Any]) -> bool:
    return (
        lost["place"] == copy["place"]
        and lost["hop_tai"] >= copy["hop_tai"]
        and (
            not lost["path"]
            or not copy["path"]
            or lost["path"] == copy["path"]
            or lost["hop"] == "quarantined"
        )
    )


def _sentence(subject: str, rows: list[dict[str, Any]], newest_tai: float) -> str:
    order = {hop: number for number, hop in enumerate(HOPS)}
    reached = [row for row in rows if row["outcome"] == "ok" and row["hop"] in order]
    if reached:
        last = max(reached, key=lambda row: (order[row["hop"]], row["hop_tai"]))
        text = f"{subject}: {_WORDS[last['hop']]}, {_ago(newest_tai - last['hop_tai'])} ago"
    else:
        text = f"{subject}: nothing succeeded yet"
    failures = [row for row in rows if row["outcome"] != "ok" or row["hop"] == "quarantined"]
    for row in sorted(failures, key=lambda row: float(row["hop_tai"])):
        what = "quarantined" if row["hop"] == "quarantined" else f"{row['hop']} failed"
        place = f" at {row['place']}" if row["place"] else ""
        text += (
            f"; {what}{place} ({row['outcome']}, attempt {row['attempt']}, "
            f"{_ago(newest_tai - row['hop_tai'])} ago): {row['message'] or 'no message'}"
        )
    return text + "."


def _ago(seconds: float) -> str:
    seconds = max(seconds, 0.0)
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
