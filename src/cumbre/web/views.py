"""What the pages show, as plain data: each function's result is also the page's JSON."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from cumbre.core.time import Clock, day_obs_from_tai, isot, mjd_from_seconds, utc_from_tai
from cumbre.ledger.schema import VISIT_HOPS

if TYPE_CHECKING:
    from cumbre.core.configuration import SiteConfig
    from cumbre.stores.postgres import Database

HOPS = (
    "exposed", "read_out", "header", "written", "buffered", "at_base", "base_tape", "sent", "at_archive",
    "archive_tape", "ingested_oods", "ingested_embargo", "preloaded", "processed", "alerted",
)  # fmt: skip


def times(tai_s: float) -> dict[str, Any]:
    """One instant in every form that people ask for."""
    return {
        "tai": isot(tai_s),
        "utc": isot(utc_from_tai(tai_s)) + "Z",
        "mjd_tai": round(mjd_from_seconds(tai_s), 8),
        "day_obs": day_obs_from_tai(tai_s),
    }


def expected_hops(config: SiteConfig) -> list[str]:
    """Hops that every detector image of a site has to pass: those of its archive."""
    chain = ["written"]
    for link in config.links:
        chain.append(f"at_{link.target}")
        chain += [f"{link.target}_tape"] * (config.places[link.target].tape is not None)
    return chain


def flow(db: Database, clock: Clock, expected: Collection[str] = ()) -> dict[str, Any]:
    """Each hop from shutter to alert: how many detector images passed, lag behind the shutter, backlog.

    Lag is the median of the hop's time minus the end of read-out (of the visit's last exposure where all of them
    are needed) over the last 40 detector images, in night seconds. Backlog counts detector images read out that
    have not passed the hop. Only what passed with the outcome ok counts; failures stand apart.

    Parameters
    ----------
    expected
        Hops that have a backlog even when nothing passed them yet.
    """
    rows = db.query(
        """
        WITH read AS (SELECT obs_id, detector, hop_tai FROM ledger.hop
                      WHERE hop = 'read_out' AND outcome = 'ok' AND detector >= 0),
             -- a hop of the whole image (detector -1: its header) is a hop of each detector read out
             passed AS (SELECT h.hop, r.obs_id, r.detector, min(h.hop_tai) AS hop_tai,
                               min(h.hop_tai) - CASE WHEN h.hop = ANY(%s) THEN min(v.hop_tai) ELSE min(r.hop_tai) END
                               AS lag
                        FROM ledger.hop h JOIN read r ON r.obs_id = h.obs_id AND h.detector IN (r.detector, -1)
                        JOIN ledger.visit_read_out v ON v.obs_id = r.obs_id AND v.detector = r.detector
                        WHERE h.outcome = 'ok'
                        GROUP BY h.hop, r.obs_id, r.detector),
             ranked AS (SELECT *, row_number() OVER (PARTITION BY hop ORDER BY hop_tai DESC) AS n FROM passed)
        SELECT hop, count(*) AS count, (SELECT count(*) FROM read) - count(*) AS backlog,
               percentile_cont(0.5) WITHIN GROUP (ORDER BY lag) FILTER (WHERE n <= 40) AS lag_s,
               max(hop_tai) AS last_tai
        FROM ranked GROUP BY hop
        """,
        (list(VISIT_HOPS),),
    )
    by_name = {row["hop"]: row for row in rows}
    waiting = int(by_name["read_out"]["count"]) if "read_out" in by_name else 0
    failures = db.query(
        "SELECT hop, outcome, count(*) AS count FROM ledger.hop WHERE outcome <> 'ok' GROUP BY hop, outcome",
        (),
    )
    return {
        "now": times(clock.now_tai_s()),
        "hops": [
            {
                "hop": hop,
                "count": int(by_name[hop]["count"]) if hop in by_name else 0,
                "lag_s": None if hop not in by_name else _round(by_name[hop]["lag_s"]),
                "backlog": int(by_name[hop]["backlog"])
                if hop in by_name
                else waiting
                if hop in expected
                else None,
                "last_utc": isot(utc_from_tai(by_name[hop]["last_tai"])) + "Z" if hop in by_name else None,
                "failures": {f["outcome"]: int(f["count"]) for f in failures if f["hop"] == hop},
            }
            for hop in HOPS
        ],
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(float(value), 2)


def exposures(db: Database, limit: int = 200) -> list[dict[str, Any]]:
    """The newest images: identity, target, and how far their detectors have come."""
    return db.query(
        """
        SELECT i.obs_id, i.instrument, i.day_obs, i.seq_num, i.band, i.image_type, i.exposure_s,
               count(DISTINCT h.detector) FILTER (WHERE h.hop = 'read_out') AS read_out,
               count(DISTINCT h.detector) FILTER (WHERE h.hop = 'at_base' AND outcome = 'ok') AS at_base,
               count(DISTINCT h.detector) FILTER (WHERE h.hop = 'at_archive' AND outcome = 'ok') AS at_archive,
               count(DISTINCT h.detector) FILTER (WHERE h.hop = 'processed') AS processed,
               count(DISTINCT h.detector) FILTER (WHERE h.outcome <> 'ok') AS failed
        FROM ledger.image i LEFT JOIN ledger.hop h ON h.obs_id = i.obs_id AND h.detector >= 0
        GROUP BY i.obs_id ORDER BY i.day_obs DESC, i.seq_num DESC LIMIT %s
        """,
        (limit,),
    )


def exposure(db: Database, obs_id: str) -> dict[str, Any] | None:
    """One image: every hop of every detector in order of time."""
    image = db.query("SELECT * FROM ledger.image WHERE obs_id = %s", (obs_id,))
    if not image:
        return None
    hops = db.query(
        "SELECT detector, hop, outcome, place, byte_size, checksum, message, hop_tai, attempt FROM ledger.hop"
        " WHERE obs_id = %s ORDER BY detector, hop_tai",
        (obs_id,),
    )
    for hop in hops:
        hop["hop_utc"] = isot(utc_from_tai(hop["hop_tai"])) + "Z"
    return {"image": image[0], "hops": hops}
