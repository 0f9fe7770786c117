"""The night report: computed from the camera's store, the ledger, re-hashed files, Level 1 and the truth.

``report/night.html`` for people, ``report/night.json`` for programs, written atomically together.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.core.configuration import Site
from cumbre.core.instrument import load_instrument
from cumbre.core.time import isot, utc_from_tai
from cumbre.ledger.schema import VISIT_HOPS
from cumbre.site.night import daq_images
from cumbre.site.roles import site_database
from cumbre.site.truth import Score, injected, of_visit, score
from cumbre.stores.files import write_atomic
from cumbre.web.views import HOPS

if TYPE_CHECKING:
    from cumbre.stores.postgres import Database

REQUIRED_LATENCY_S = 60.0
COPIES = {"base": "at_base", "archive": "at_archive"}
BEST_CURVES = 4


@dataclass(frozen=True, slots=True)
class Report:
    """What was written, and what the terminal prints."""

    path: Path
    data: dict[str, Any]
    lines: list[str]


def write_report(site: Site, *, faults: list[str], started_mono: float) -> Report:
    """Compute and write the report of a site's night.

    ``started_mono`` is the monotonic time at which the whole run began, for its wall time.
    """
    from cumbre.site import report_page

    db = site_database(site)
    data = collect(site, db)
    data["faults"] = faults
    pictures = report_page.pictures(site, db, data)
    data["wall_s"] = round(time.monotonic() - started_mono, 1)
    folder = site.root / "report"
    write_atomic(folder / "night.json", json.dumps(data, default=str, indent=1).encode())
    write_atomic(folder / "night.html", report_page.page(site, data, pictures).encode())
    return Report(folder / "night.html", data, summary_lines(data))


def collect(site: Site, db: Database) -> dict[str, Any]:
    """All numbers of the report."""
    taken = daq_images(site)
    names = [d.name for d in load_instrument(site.config.instruments[0]).detectors]
    copies = verify_copies(site, db, taken)
    wanted = {(obs_id, name) for obs_id in taken for name in names}
    good = {place: {key for key, ok in copies[place].items() if ok} for place in COPIES}
    lost = sorted(wanted - (good["base"] & good["archive"]))
    latency = latencies(db)
    night_score = truth_score(site, db)
    late = [row for row in latency if row["latency_s"] > site.config.prompt.deadline_s]
    values = np.array([row["latency_s"] for row in latency])
    alerts = db.query("SELECT count(*) AS n FROM level1.alert_outbox WHERE sent_tai IS NOT NULL", ())
    return {
        "site": site.config.observatory.name,
        "seed": site.config.simulator.seed if site.config.simulator else None,
        "images_taken": len(taken),
        "detector_images": len(wanted),
        "visits": visits(db),
        "verified_base": _whole(taken, names, good["base"]),
        "verified_archive": _whole(taken, names, good["archive"]),
        "lost": len({obs_id for obs_id, _ in lost}),
        "lost_detector_images": [f"{obs_id} {name}" for obs_id, name in lost],
        "late": len(late),
        "latency_s": {
            "p50": _percentile(values, 50),
            "p98": _percentile(values, 98),
            "required": site.config.prompt.deadline_s,
            "clock": "night seconds, end of the visit's last read-out to the detector's alerts stored and queued",
        },
        "processed": len(latency),
        "outcomes": outcomes(db),
        "left_for_later": missed(db),
        "alerts": int(alerts[0]["n"]),
        "completeness": night_score.completeness,
        "purity": night_score.purity,
        "n_truth": night_score.n_truth,
        "by_kind": night_score.by_kind,
        "n_detections": night_score.n_detections,
        "by_magnitude": night_score.by_magnitude,
        "injected": injected(site.root),
        "missed": night_score.missed[:50],
        "false": night_score.false[:50],
        "hops": hop_table(db),
        "failures": failures(db),
    }


def _whole(taken: list[str], names: list[str], good: set[tuple[str, str]]) -> int:
    return sum(all((obs_id, name) in good for name in names) for obs_id in taken)


def visits(db: Database) -> dict[str, int]:
    """Visits of the sky, and those of several exposures."""
    rows = db.execute(
        "SELECT count(*), count(*) FILTER (WHERE n > 1) FROM (SELECT count(*) AS n FROM ledger.image"
        " WHERE image_type = 'OBJECT' GROUP BY instrument, coalesce(visit, exposure_id)) v"
    )
    return {"taken": int(rows[0][0]), "of_several_exposures": int(rows[0][1])}


def _percentile(values: np.ndarray[Any, Any], q: float) -> float | None:
    return round(float(np.percentile(values, q)), 2) if len(values) else None


def verify_copies(site: Site, db: Database, taken: list[str]) -> dict[str, dict[tuple[str, str], bool]]:
    """Hash every file at base and archive again and compare with the writer's checksum in the ledger."""
    from cumbre.stores.files import sha256_of

    written = {
        (row["obs_id"], row["detector"]): row["checksum"].removeprefix("sha256:")
        for row in db.query(
            "SELECT obs_id, detector, checksum FROM ledger.hop WHERE hop = 'written' AND outcome = 'ok' AND detector >= 0",
            (),
        )
    }
    instrument = load_instrument(site.config.instruments[0])
    names = {d.id: d.name for d in instrument.detectors}
    rows = db.query(
        "SELECT obs_id, detector, hop, path FROM ledger.hop WHERE hop IN ('at_base', 'at_archive')"
        " AND outcome = 'ok' AND detector >= 0",
        (),
    )

    def check(row: dict[str, Any]) -> bool:
        path = Path(row["path"])
        expected = written.get((row["obs_id"], row["detector"]))
        return expected is not None and path.is_file() and sha256_of(path).removeprefix("sha256:") == expected

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(check, rows))
    out: dict[str, dict[tuple[str, str], bool]] = {place: {} for place in COPIES}
    known = set(taken)
    for row, ok in zip(rows, results, strict=True):
        if row["obs_id"] in known and row["detector"] in names:
            place = "base" if row["hop"] == "at_base" else "archive"
            out[place][row["obs_id"], names[row["detector"]]] = ok
    return out


def latencies(db: Database) -> list[dict[str, Any]]:
    """Per detector and visit: end of the last read-out to alerts stored, night seconds.

    ``obs_id`` names the first exposure. An exposure that the others were processed without has no row.
    """
    return db.query(
        """
        SELECT min(i.obs_id) AS obs_id, p.detector, (array_agg(p.outcome ORDER BY p.hop_tai, i.obs_id))[1] AS outcome,
               min(p.hop_tai) - max(r.hop_tai) AS latency_s
        FROM (SELECT p.*, bool_or(p.outcome = 'ok') OVER (PARTITION BY j.instrument, p.detector,
                     coalesce(j.visit, j.exposure_id)) AS is_made
              FROM ledger.hop p JOIN ledger.image j USING (obs_id) WHERE p.hop = 'processed' AND p.detector >= 0) p
        JOIN ledger.image i USING (obs_id) JOIN ledger.visit_read_out r USING (obs_id, detector)
        WHERE p.outcome = 'ok' OR NOT p.is_made
        GROUP BY i.instrument, p.detector, coalesce(i.visit, i.exposure_id) ORDER BY 1, 2
        """,
        (),
    )


def outcomes(db: Database) -> dict[str, int]:
    """Outcome words of processing → number of detector images."""
    rows = db.query(
        "SELECT outcome, count(*) AS n FROM ledger.hop WHERE hop = 'processed' AND detector >= 0 GROUP BY outcome",
        (),
    )
    return {row["outcome"]: int(row["n"]) for row in rows}


def missed(db: Database) -> dict[str, dict[str, int]]:
    """Images that prompt processing left for later: reason → state → number."""
    from cumbre.orchestration.missed import summary

    return summary(db)


def hop_table(db: Database) -> list[dict[str, Any]]:
    """Each hop: count, and the lag behind the end of read-out (p50, p98), night seconds.

    What is made of a whole visit lags behind the last read-out of its exposures.
    """
    rows = db.query(
        """
        SELECT hop, count(*) AS count, percentile_cont(0.5) WITHIN GROUP (ORDER BY lag) AS p50,
               percentile_cont(0.98) WITHIN GROUP (ORDER BY lag) AS p98
        FROM (SELECT h.hop, h.hop_tai - CASE WHEN h.hop = ANY(%s) THEN v.hop_tai ELSE r.hop_tai END AS lag
              FROM ledger.hop h JOIN ledger.hop r
                ON r.obs_id = h.obs_id AND r.detector = h.detector AND r.hop = 'read_out'
              JOIN ledger.visit_read_out v ON v.obs_id = h.obs_id AND v.detector = h.detector
              WHERE h.detector >= 0) lags GROUP BY hop
        """,
        (list(VISIT_HOPS),),
    )
    by_name = {row["hop"]: row for row in rows}
    return [
        {"hop": hop, "count": int(by_name[hop]["count"]), "p50": round(by_name[hop]["p50"], 2),
         "p98": round(by_name[hop]["p98"], 2)}
        for hop in HOPS if hop in by_name
    ]  # fmt: skip


def failures(db: Database) -> list[dict[str, Any]]:
    """What did not go well, and what to do about it."""
    rows = db.query(
        "SELECT obs_id, detector, hop, outcome, message, hop_tai FROM ledger.hop"
        " WHERE lower(outcome) NOT IN ('ok', 'success') ORDER BY hop_tai LIMIT 200",
        (),
    )
    for row in rows:
        row["utc"] = isot(utc_from_tai(row.pop("hop_tai"))) + "Z"
        row["what_to_do"] = f"cumbre query ledger why {row['obs_id']}"
    return rows


def truth_score(site: Site, db: Database) -> Score:
    """Completeness and purity of the published detections of every processed detector image."""
    import pyarrow.parquet as pq

    sources = db.query(
        "SELECT s.visit, s.detector, s.ra, s.dec, s.snr, s.reliability, s.diasourceid AS id"
        " FROM level1.diasource s WHERE s.reliability >= %s",
        (site.config.prompt.reliability,),
    )
    done = db.query(
        "SELECT h.detector, coalesce(i.visit, i.exposure_id) AS visit, array_agg(i.obs_id ORDER BY i.obs_id) AS obs_ids"
        " FROM ledger.hop h JOIN ledger.image i USING (obs_id)"
        " WHERE h.hop = 'processed' AND h.detector >= 0 AND lower(h.outcome) IN ('ok', 'success')"
        " GROUP BY i.instrument, h.detector, coalesce(i.visit, i.exposure_id) ORDER BY 3, 1",
        (),
    )
    pairs = []
    for row in done:
        exposures = []
        for obs_id in row["obs_ids"]:
            path = site.root / "simulator" / f"truth_{obs_id}.parquet"
            if not path.exists():
                continue
            table = pq.read_table(path)
            here = np.flatnonzero(table["detector"].to_numpy() == row["detector"])
            names = ("id", "kind", "ra", "dec", "x", "y", "snr", "mag", "usable")
            exposures.append({name: table[name].to_numpy(zero_copy_only=False)[here] for name in names})
        if not exposures:
            continue
        truth = of_visit(exposures)
        mine = [s for s in sources if s["visit"] == row["visit"] and s["detector"] == row["detector"]]
        detections = {name: np.array([s[name] for s in mine]) for name in ("id", "ra", "dec", "snr")}
        pairs.append((truth, detections))
    return score(pairs)


def summary_lines(data: dict[str, Any]) -> list[str]:
    """The report in the terminal."""
    latency = data["latency_s"]
    percent = {k: "–" if data[k] is None else f"{100 * data[k]:.1f} %" for k in ("completeness", "purity")}
    lines = [
        "",
        f"images taken        {data['images_taken']} ({data['detector_images']} detector images)"
        + (f" in {data['visits']['taken']} visits" if data["visits"]["of_several_exposures"] else ""),
        f"verified at base    {data['verified_base']}",
        f"verified at archive {data['verified_archive']}",
        f"lost                {data['lost']}",
        f"late                {data['late']} of {data['processed']} processed",
        f"latency             p50 {latency['p50']} s, p98 {latency['p98']} s (required {latency['required']:.0f} s)",
        f"alerts              {data['alerts']}",
        f"completeness        {percent['completeness']} of the transients above 8 sigma ("
        + ", ".join(f"{kind} {c['found']}/{c['n']}" for kind, c in sorted(data["by_kind"].items()))
        + ")",
        f"purity              {percent['purity']} of {data['n_detections']} above 8 sigma",
        f"outcomes            {', '.join(f'{k} {v}' for k, v in data['outcomes'].items()) or 'none'}",
        f"wall time           {data['wall_s']} s",
    ]
    if data["injected"]:
        planted = data["injected"]
        lines.insert(
            -2,
            f"planted sources     {planted['found']} of {planted['n']} found in {planted['visits']} visits: "
            + ", ".join(f"mag {r['mag']:.1f} {r['found']}/{r['n']}" for r in planted["by_magnitude"]),
        )
    for reason, states in data["left_for_later"].items():
        done = ", ".join(f"{n} {state}" for state, n in states.items())
        lines.append(f"left for later      {reason}: {done}")
    for fault in data["faults"]:
        lines.append(f"fault               {fault}")
    for item in data["failures"][:5]:
        lines.append(
            f"▲ {item['obs_id']} detector {item['detector']} {item['hop']}: {item['outcome']}: {item['message']}"
        )
    return [*lines, ""]
