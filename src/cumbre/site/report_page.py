"""The pictures and the page of the night report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.core.configuration import Site
from cumbre.core.errors import CumbreError
from cumbre.ledger.schema import VISIT_HOPS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cumbre.stores.postgres import Database

BACK, CARD, INK, SOFT, ACCENT, WARN = "#12161c", "#1b222c", "#dfe6ee", "#8fa0b3", "#8cc4ff", "#ff9d5c"
HOP_COLOURS = {
    "written": "#5b8def", "at_base": "#58c4c4", "at_archive": "#6fd08c", "ingested_embargo": "#c9d16a",
    "processed": "#ff9d5c",
}  # fmt: skip
N_TRANSIENTS = 6


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=BACK, layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    return figure, axes


def _style(axes: Any) -> None:
    axes.set_facecolor(CARD)
    axes.tick_params(colors=SOFT, labelsize=8)
    for spine in axes.spines.values():
        spine.set_color("#2b3644")
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(INK)
        label.set_fontsize(9)


def _encode(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor=BACK)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def pictures(site: Site, db: Database, data: dict[str, Any]) -> dict[str, str]:
    """Name → picture as a data URI; a picture without data is left out."""
    out = {}
    rows = db.query(
        "SELECT i.seq_num, h.detector, h.hop, min(h.hop_tai) AS tai, min(v.hop_tai) AS visit_tai FROM ledger.hop h"
        " JOIN ledger.image i USING (obs_id) JOIN ledger.visit_read_out v USING (obs_id, detector)"
        " WHERE h.detector >= 0 GROUP BY i.seq_num, h.detector, h.hop",
        (),
    )
    if rows:
        out["timeline"] = _timeline(rows, site.config.prompt.deadline_s)
    if data["by_magnitude"]:
        out["completeness"] = _completeness(data["by_magnitude"])
    with contextlib.suppress(CumbreError):
        stamps = _transients(db)
        if stamps:
            out["transients"] = stamps
    return out


def _timeline(rows: list[dict[str, Any]], deadline_s: float) -> str:
    """Every detector image from the end of read-out to its alerts; the dashed line is the requirement.

    Processed counts from the last read-out of the visit.
    """
    read = {(r["seq_num"], r["detector"]): r["tai"] for r in rows if r["hop"] == "read_out"}
    keys = sorted(read)
    figure, axes = _figure(9, max(2.2, 0.09 * len(keys) + 1.1))
    for hop, colour in HOP_COLOURS.items():
        points = [(r["tai"] - (r["visit_tai"] if hop in VISIT_HOPS else read[k]), keys.index(k)) for r in rows
                  if r["hop"] == hop and (k := (r["seq_num"], r["detector"])) in read]  # fmt: skip
        if points:
            x, y = np.array(points).T
            axes.scatter(x, y, s=11, color=colour, label=hop.replace("_", " "))
    axes.axvline(deadline_s, color=WARN, ls="--", lw=1)
    axes.text(deadline_s, len(keys) - 0.5, f" required {deadline_s:.0f} s", color=WARN, fontsize=8, va="top")
    axes.set_yticks(range(len(keys)), [f"{s} · {d}" for s, d in keys], fontsize=5 if len(keys) > 30 else 7)
    axes.invert_yaxis()
    axes.set(
        xlabel="night seconds after the end of read-out", ylabel="image · detector", title="Each image's way"
    )
    axes.legend(loc="lower right", fontsize=7, facecolor=CARD, edgecolor=CARD, labelcolor=INK)
    return _encode(figure)


def _completeness(rows: list[dict[str, Any]]) -> str:
    figure, axes = _figure(4.5, 2.8)
    mags = [row["mag"] + 0.25 for row in rows]
    axes.bar(mags, [100 * row["completeness"] for row in rows], width=0.42, color=ACCENT)
    for mag, row in zip(mags, rows, strict=True):
        axes.text(mag, 3, f"{row['found']}/{row['n']}", ha="center", fontsize=7, color=BACK)
    axes.set(xlabel="magnitude of the change (AB)", ylabel="recovered, %", ylim=(0, 105),
             title="Completeness above 8 sigma")  # fmt: skip
    return _encode(figure)


def _transients(db: Database) -> str | None:
    """Stamps and light curves of the objects with the most and strongest detections."""
    from matplotlib.figure import Figure

    best = db.query(
        "SELECT diaobjectid AS id, count(*) AS n, max(snr) AS snr FROM level1.diasource"
        " WHERE reliability >= 0.5 AND diaobjectid IS NOT NULL AND NOT isnegative AND NOT pixelflags_saturated"
        " GROUP BY diaobjectid ORDER BY n DESC, snr DESC LIMIT %s",
        (N_TRANSIENTS,),
    )
    if not best:
        return None
    figure = Figure(figsize=(9, 1.75 * len(best)), facecolor=BACK, layout="constrained")
    axes = figure.subplots(len(best), 4, width_ratios=[1, 1, 1, 2.4], squeeze=False)
    for row, item in zip(axes, best, strict=True):
        sources = db.query(
            "SELECT diasourceid AS id, midpointmjdtai AS mjd, psfflux AS flux, psffluxerr AS err, ra, dec"
            " FROM level1.diasource WHERE diaobjectid = %s ORDER BY midpointmjdtai",
            (item["id"],),
        )
        strongest = max(sources, key=lambda s: abs(s["flux"] / s["err"]))
        for cell, (name, stamp) in zip(row, _stamps(db, strongest["id"]).items(), strict=False):
            _draw_stamp(cell, stamp, name)
        curve = row[3]
        _style(curve)
        minutes = [(s["mjd"] - sources[0]["mjd"]) * 1440 for s in sources]
        curve.errorbar(minutes, [s["flux"] / 1e3 for s in sources], [s["err"] / 1e3 for s in sources],
                       fmt="o", ms=4, color=ACCENT, ecolor=SOFT)  # fmt: skip
        curve.set(
            ylabel="difference, µJy",
            xlabel="minutes after the first",
            title=f"{strongest['ra']:.5f} {strongest['dec']:+.5f}   {item['n']} detections, SNR {item['snr']:.0f}",
        )
    return _encode(figure)


def _stamps(db: Database, source_id: int) -> dict[str, Any]:
    """Science, template and difference stamps of one packet."""
    from astropy.io import fits

    from cumbre.alerts.packet import decode_packet

    rows = db.query("SELECT packet FROM level1.alert_outbox WHERE alert_id = %s", (source_id,))
    if not rows:
        return {}
    record = decode_packet(bytes(rows[0]["packet"]))
    out = {}
    for name in ("Science", "Template", "Difference"):
        raw = record[f"cutout{name}"]
        if raw:
            with fits.open(io.BytesIO(raw)) as hdus:
                out[name.lower()] = np.array(hdus[0].data)
    return out


def _draw_stamp(axes: Any, stamp: Any, name: str) -> None:
    finite = stamp[np.isfinite(stamp)]
    middle = float(np.median(finite))
    spread = float(1.4826 * np.median(np.abs(finite - middle))) or 1.0
    axes.imshow(stamp, origin="lower", cmap="gray", vmin=middle - 2 * spread, vmax=middle + 8 * spread)
    axes.set_title(name, color=SOFT, fontsize=7)
    axes.set_axis_off()


STYLE = f"""body {{ background: {BACK}; color: {INK}; font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
max-width: 1060px; padding: 1.5rem; }} h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.05rem; margin-top: 2.2rem; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .6rem; }}
.card {{ background: {CARD}; padding: .6rem .8rem; border-radius: 4px; border-left: 3px solid #6fd08c; }}
.card.bad {{ border-left: 3px double {WARN}; }} .card b {{ display: block; font-size: 1.35rem; }}
.card span {{ color: {SOFT}; font-size: .85rem; }} table {{ border-collapse: collapse; }}
th {{ color: {SOFT}; text-align: left; font-weight: 500; }}
td, th {{ padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #2b3644; vertical-align: top; }}
img {{ max-width: 100%; }} code {{ color: {ACCENT}; }} p {{ color: {SOFT}; }}"""


def _card(label: str, value: Any, note: str, *, good: bool = True) -> str:
    mark = "" if good else "▲ "
    return (
        f'<div class="card{"" if good else " bad"}"><span>{html.escape(label)}</span>'
        f"<b>{mark}{html.escape(str(value))}</b><span>{html.escape(note)}</span></div>"
    )


def _taken(data: dict[str, Any]) -> str:
    several = data["visits"]["of_several_exposures"]
    return f"{data['detector_images']} detector images" + (
        f" in {data['visits']['taken']} visits" if several else ""
    )


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def _table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    head = "".join(f"<th>{html.escape(c.replace('_', ' '))}</th>" for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(row.get(c, '')))}</td>" for c in columns) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def page(site: Site, data: dict[str, Any], images: dict[str, str]) -> str:
    """The report as one HTML text."""
    latency = data["latency_s"]
    complete = data["completeness"] is None or data["completeness"] >= 0.9
    pure = data["purity"] is None or data["purity"] >= 0.8
    taken = data["images_taken"]
    p98 = latency["p98"]
    cards = [
        _card("images taken", taken, _taken(data)),
        _card("verified at base", data["verified_base"], "re-hashed", good=data["verified_base"] == taken),
        _card("verified at archive", data["verified_archive"], "re-hashed", good=data["verified_archive"] == taken),
        _card("lost", data["lost"], "must be 0", good=data["lost"] == 0),
        _card("late", data["late"], f"over {latency['required']:.0f} s", good=data["late"] == 0),
        _card("latency p50 / p98", f"{latency['p50']} / {p98} s", "night time",
              good=p98 is not None and p98 <= latency["required"]),
        _card("alerts", data["alerts"], "sent to the feed"),
        _card("completeness", _percent(data["completeness"]), "transients above 8 sigma", good=complete),
        _card("purity", _percent(data["purity"]), f"of {data['n_detections']} above 8 sigma", good=pure),
    ]  # fmt: skip
    parts = [
        f"<h1>Night report · {html.escape(site.config.observatory.name)}</h1>",
        f'<div class="cards">{"".join(cards)}</div>',
    ]
    if "timeline" in images:
        parts.append(
            f'<h2>From shutter to alert</h2><img alt="timeline of each image" src="{images["timeline"]}">'
        )
    parts.append("<h2>Hops</h2>" + _table(data["hops"], ["hop", "count", "p50", "p98"]))
    lag = "Lag behind the end of read-out in night seconds"
    if data["visits"]["of_several_exposures"]:
        lag += "; of processed and alerted, behind the last read-out of the visit"
    parts.append(f"<p>{lag}.</p>")
    if "completeness" in images:
        parts.append(
            f'<h2>Against the truth</h2><img alt="completeness per magnitude" src="{images["completeness"]}">'
        )
    if "transients" in images:
        parts.append(
            f'<h2>Best transients</h2><img alt="stamps and light curves" src="{images["transients"]}">'
        )
    parts.append("<h2>What went wrong</h2>")
    if data["faults"]:
        parts.append("<p>Caused on purpose: " + html.escape("; ".join(data["faults"])) + "</p>")
    if data["failures"]:
        parts.append(
            _table(data["failures"], ["utc", "obs_id", "detector", "hop", "outcome", "message", "what_to_do"])
        )
    else:
        parts.append("<p>Nothing.</p>")
    parts.append(f"<p>Outcomes of processing: {html.escape(str(data['outcomes']))}. Wall time {data['wall_s']} s. "
                 'The same as data: <a style="color:#8cc4ff" href="night.json">night.json</a>.</p>')  # fmt: skip
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Night report</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
