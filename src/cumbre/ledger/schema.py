"""Tables of the ledger. Steps are never edited; append a new one."""

from __future__ import annotations

from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Database

HOPS = (
    "exposed", "read_out", "header", "written", "buffered", "at_base", "base_tape", "sent", "at_archive",
    "archive_tape", "ingested_oods", "ingested_embargo", "preloaded", "processed", "alerted",
)  # fmt: skip
"""The way of an image, in order; ``quarantined`` and ``deleted`` may come anywhere."""
COPY_HOPS = ("written", "buffered", "at_base", "base_tape", "at_archive", "archive_tape")
"""Hops that say: a copy with this checksum was verified at this place."""
VISIT_HOPS = ("processed", "alerted")
"""Hops of what is made of all exposures of a visit."""
_ORDER = ", ".join(f"'{hop}'" for hop in HOPS)

STEPS = (
    f"""
    CREATE SCHEMA IF NOT EXISTS ledger;
    CREATE TABLE ledger.image (
        obs_id text PRIMARY KEY,
        instrument text NOT NULL DEFAULT '',
        exposure_id bigint,
        group_id text NOT NULL DEFAULT '',
        day_obs int,
        seq_num int,
        image_type text NOT NULL DEFAULT '',
        band text,
        filter text,
        exposure_s float8,
        ra float8,
        "dec" float8,
        rotation float8,
        program text,
        begin_tai float8,
        end_tai float8,
        expected_detectors int
    );
    CREATE INDEX image_day ON ledger.image (day_obs, seq_num);
    CREATE TABLE ledger.hop (
        obs_id text NOT NULL REFERENCES ledger.image,
        detector int NOT NULL,
        detector_name text NOT NULL DEFAULT '',
        hop text NOT NULL,
        outcome text NOT NULL,
        place text NOT NULL DEFAULT '',
        path text NOT NULL DEFAULT '',
        byte_size bigint,
        checksum text NOT NULL DEFAULT '',
        message text NOT NULL DEFAULT '',
        hop_tai float8 NOT NULL,
        recv_tai float8 NOT NULL,
        attempt int NOT NULL DEFAULT 1,
        PRIMARY KEY (obs_id, detector, hop, place)
    );
    CREATE INDEX hop_failed ON ledger.hop (hop_tai) WHERE outcome <> 'ok';
    CREATE INDEX hop_time ON ledger.hop (hop, hop_tai);
    CREATE TABLE ledger.hop_history (
        obs_id text NOT NULL,
        detector int NOT NULL,
        hop text NOT NULL,
        outcome text NOT NULL,
        place text NOT NULL DEFAULT '',
        path text NOT NULL DEFAULT '',
        byte_size bigint,
        checksum text NOT NULL DEFAULT '',
        message text NOT NULL DEFAULT '',
        hop_tai float8 NOT NULL,
        recv_tai float8 NOT NULL,
        attempt int NOT NULL DEFAULT 1,
        PRIMARY KEY (obs_id, detector, hop, place, hop_tai, outcome, attempt)
    );
    CREATE TABLE ledger.bad_message (
        topic text NOT NULL,
        bus_offset bigint NOT NULL,
        outcome text NOT NULL,
        error text NOT NULL,
        fields text NOT NULL,
        recv_tai float8 NOT NULL,
        PRIMARY KEY (topic, bus_offset)
    );
    CREATE VIEW ledger.status AS
    SELECT i.obs_id, h.detector, h.detector_name, i.instrument, i.exposure_id, i.day_obs, i.seq_num, i.band,
           i.image_type, h.last_hop, h.last_outcome, h.last_place, h.last_tai, h.last_message,
           h.hops_ok, h.failures
    FROM ledger.image i JOIN (
        SELECT obs_id, detector, max(detector_name) AS detector_name,
               (array_agg(hop ORDER BY step DESC))[1] AS last_hop,
               (array_agg(outcome ORDER BY step DESC))[1] AS last_outcome,
               (array_agg(place ORDER BY step DESC))[1] AS last_place,
               (array_agg(hop_tai ORDER BY step DESC))[1] AS last_tai,
               (array_agg(message ORDER BY step DESC))[1] AS last_message,
               array_agg(hop ORDER BY step) FILTER (WHERE outcome = 'ok') AS hops_ok,
               count(*) FILTER (WHERE outcome <> 'ok') AS failures
        FROM (SELECT *, coalesce(array_position(ARRAY[{_ORDER}], hop), 0) * 1e12
                        + hop_tai AS step
              FROM ledger.hop) AS ordered
        GROUP BY obs_id, detector
    ) h USING (obs_id);
    """,  # noqa: S608 (the words are ours)
    """
    CREATE TABLE ledger.visit_without_image (
        group_id text NOT NULL,
        detector int NOT NULL,
        outcome text NOT NULL,
        message text NOT NULL DEFAULT '',
        told_tai float8 NOT NULL,
        PRIMARY KEY (group_id, detector)
    );
    """,
    """
    ALTER TABLE ledger.image ADD COLUMN visit bigint;
    UPDATE ledger.image SET visit = exposure_id;
    CREATE INDEX image_visit ON ledger.image (coalesce(visit, exposure_id));
    -- of each detector image: the end of its visit's last read-out, from which latency counts
    CREATE VIEW ledger.visit_read_out AS
    SELECT i.obs_id, r.detector, max(r.hop_tai) AS hop_tai
    FROM ledger.image i
    JOIN ledger.image o ON coalesce(o.visit, o.exposure_id) = coalesce(i.visit, i.exposure_id)
        AND o.instrument = i.instrument
    JOIN ledger.hop r ON r.obs_id = o.obs_id AND r.hop = 'read_out' AND r.outcome = 'ok'
    GROUP BY i.obs_id, r.detector;
    """,
)


def prepare(database: Database) -> None:
    """Bring the ledger's tables to this program's version."""
    migrate(database, "ledger", STEPS)
