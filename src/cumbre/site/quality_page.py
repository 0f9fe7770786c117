"""The quality report as files: ``quality.json``, PNG plots, one HTML page that needs nothing else, and Markdown."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.stores.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGETS: tuple[tuple[str, tuple[str, ...], str, Callable[[float], bool]], ...] = (
    ("completeness above 6 sigma", ("above", "6", "completeness"), ">= 95 %", lambda v: v >= 0.95),
    ("completeness above 10 sigma", ("above", "10", "completeness"), ">= 99 %", lambda v: v >= 0.99),
    ("purity above 6 sigma", ("above", "6", "purity"), ">= 95 %", lambda v: v >= 0.95),
    ("flux bias", ("flux", "bias"), "< 1 %", lambda v: abs(v) < 0.01),
    ("width of pulls", ("flux", "pull_width"), "0.9–1.1", lambda v: 0.9 <= v <= 1.1),
    (
        "width of pulls, science flux of stars",
        ("flux", "stars", "pull_width"),
        "0.9–1.1",
        lambda v: 0.9 <= v <= 1.1,
    ),
    ("stars against reference (mas)", ("astrometry_mas", "stars_vs_reference"), "< 20", lambda v: v < 20),
)
TICKS = (5, 7, 10, 20, 50, 100)
PERCENT = ("completeness", "purity", "bias")


def targets(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Each required figure: name, value, requirement, whether it is met."""
    rows = []
    for name, keys, wanted, is_met in TARGETS:
        value: Any = data
        for key in keys:
            value = value[key]
        rows.append(
            {
                "name": name,
                "value": value,
                "required": wanted,
                "is_met": value is not None and bool(is_met(value)),
                "is_part": keys[-1] in PERCENT,
            }
        )
    return rows


def shown(value: float | None, *, is_part: bool = False) -> str:
    """A number as people read it."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if is_part else f"{value:.2f}"


def _range(low: float, high: float | None) -> str:
    return f"{low:g}–{high:g}" if high else f"from {low:g}"


def write(folder: Path, data: dict[str, Any]) -> dict[str, str]:
    """Write every file of the report; name → path."""
    plots = {"snr": _by_snr(data), "magnitude": _by_magnitude(data), "classes": _by_class(data)}
    files: dict[str, bytes] = {"quality.json": json.dumps(data, indent=1, allow_nan=False).encode()}
    for name, figure in plots.items():
        files[f"quality_{name}.png"] = _png(figure)
    files["quality.md"] = markdown(data).encode()
    pictures = {name: files[f"quality_{name}.png"] for name in plots}
    files["quality.html"] = page(data, pictures).encode()
    for name, content in files.items():
        write_atomic(folder / name, content)
    return {name: str(folder / name) for name in files}


def _png(figure: Figure) -> bytes:
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _axes(title: str) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


def _by_snr(data: dict[str, Any]) -> Figure:
    figure, axes = _axes("Completeness and purity by signal-to-noise")
    rows = data["by_snr"]
    middle = [np.sqrt(r["snr"] * (r["to"] or 2 * r["snr"])) for r in rows]
    for key, label, marker in (
        ("completeness", "completeness (expected S/N)", "o-"),
        ("purity", "purity (measured S/N)", "s--"),
    ):
        points = [(m, r[key]) for m, r in zip(middle, rows, strict=True) if r[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=label)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    axes.axhline(0.95, color="grey", lw=0.8, ls=":")
    axes.set_ylim(
        min(0.5, *[r[k] for r in rows for k in ("completeness", "purity") if r[k] is not None]) - 0.02, 1.01
    )
    axes.set_xlabel("signal-to-noise")
    axes.legend(fontsize=8)
    return figure


def _by_magnitude(data: dict[str, Any]) -> Figure:
    figure, axes = _axes("Completeness by magnitude (expected S/N above 5)")
    rows = [r for r in data["by_magnitude"] if r["n"]]
    axes.bar([r["mag"] + 0.5 for r in rows], [r["completeness"] for r in rows], 0.9, color="#5b8def")
    for r in rows:
        axes.text(r["mag"] + 0.5, 0.02, str(r["n"]), ha="center", fontsize=8, color="white")
    axes.set_xlabel("magnitude in this image; number of sources in the bar")
    axes.set_ylim(0, 1.02)
    return figure


def _by_class(data: dict[str, Any]) -> Figure:
    figure, axes = _axes("Part of each class kept, against the reliability asked for")
    for name, points in data["curves"].items():
        axes.plot(*zip(*points, strict=True), label=name)
    axes.axvline(data["reliability_threshold"], color="grey", lw=0.8, ls=":")
    axes.set_xlabel("least reliability")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.45, 0.95), ncols=2)
    return figure


def tables(data: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of every table."""
    goal = [
        [t["name"], shown(t["value"], is_part=t["is_part"]), t["required"], "yes" if t["is_met"] else "no"]
        for t in targets(data)
    ]
    above = [
        [f"above {limit} sigma", str(r["n"]), shown(r["completeness"], is_part=True), shown(r["completeness_all"], is_part=True),
         shown(r["detected"], is_part=True), str(r["n_published"]), shown(r["purity"], is_part=True),
         ", ".join(f"{k} {v}" for k, v in sorted(r["false"].items())) or "none"]
        for limit, r in data["above"].items()
    ]  # fmt: skip
    bins = [
        [_range(r["snr"], r["to"]), str(r["n"]), shown(r["completeness"], is_part=True),
         str(r["n_published"]), shown(r["purity"], is_part=True)]
        for r in data["by_snr"]
    ]  # fmt: skip
    mags = [
        [f"{r['mag']:g}–{r['to']:g}", str(r["n"]), shown(r["completeness"], is_part=True)]
        for r in data["by_magnitude"]
    ]
    kinds = [
        [kind, *(f"{c['found']} of {c['n']}" for c in row.values())] for kind, row in data["by_kind"].items()
    ]
    junk = [
        [name, str(r["n"]), str(r["published"]), shown(r["rejected"], is_part=True)]
        for name, r in data["rejected"].items()
    ]
    numbers = [
        [
            "flux bias (median)",
            f"{shown(data['flux']['bias'], is_part=True)} ± {shown(data['flux']['bias_err'], is_part=True)}",
        ],
        [
            "pulls: median, width",
            f"{shown(data['flux']['pull_median'])}, {shown(data['flux']['pull_width'])}",
        ],
        [
            "stars against the reference catalogue, per axis",
            f"{shown(data['astrometry_mas']['stars_vs_reference'])} mas",
        ],
        [
            "fitted WCS against the true geometry, per axis",
            f"{shown(data['astrometry_mas']['wcs_vs_truth'])} mas",
        ],
        [
            "sources above 30 sigma against the truth, per axis",
            f"{shown(data['astrometry_mas']['sources_vs_truth_snr30'])} mas",
        ],
        ["CPU time of an image, raw file to alerts", f"{shown(data['seconds_per_image'])} s"],
    ]
    changes = [
        [_range(r["snr"], r["to"]), str(r["n"]), shown(r["bias"], is_part=True), shown(r["pull_median"]), shown(r["pull_width"])]
        for r in data["flux"]["by_snr"]
    ]  # fmt: skip
    stars = [
        [_range(r["snr"], r["to"]), str(r["n"]), shown(r["science_bias"], is_part=True), shown(r["science_pull_width"]),
         shown(r["difference_pull_median"]), shown(r["difference_pull_width"])]
        for r in data["flux"]["stars"]["by_snr"]
    ]  # fmt: skip
    limits = [f"above {limit} sigma" for limit in data["above"]]
    return [
        ("Required figures", ["figure", "measured", "required", "met"], goal),
        ("By limit", ["", "changes", "completeness", "all places", "detected", "published", "purity", "false ones"], above),
        ("By signal-to-noise", ["S/N", "changes", "completeness", "published", "purity"], bins),
        ("By magnitude", ["magnitude", "changes", "completeness"], mags),
        ("By kind", ["kind", *limits], kinds),
        ("Detections of nothing real", ["class", "detected", "published", "rejected"], junk),
        ("Fluxes, places, time", ["", ""], numbers),
        ("Fluxes of changes", ["S/N", "sources", "bias", "median pull", "width of pulls"], changes),
        ("Forced fluxes of constant stars",
         ["S/N", "stars", "bias of scienceFlux", "width of its pulls", "median pull of psfFlux", "width of its pulls"], stars),
    ]  # fmt: skip


def _about(data: dict[str, Any]) -> str:
    made = data["made_of"]
    return (
        f"{data['n_images']} simulated detector images ({made['size']}, seeds {', '.join(map(str, made['seeds']))}, "
        f"{made['detectors']} detectors, {made['visits']} visits), processed from raw files on; "
        f"reliability {data['reliability_version']}, threshold {data['reliability_threshold']:g}. "
        f"Made by: {made['command']}"
    )


NOTE = (
    "Changes: everything in the truth whose difference flux exceeds the limit in units of its error: the noise of PSF "
    "photometry in the image and in the mean of the template visits, and 1 % of the flux subtracted. Places where nothing "
    "can be measured are left out (within 8 pixels of the edge, a defect within a pixel, saturated), except in “all "
    "places”. Masked neighbours, cosmic-ray hits and gaps count as missed. Purity: published sources above the measured "
    "S/N; true when something that changed lies within 1.5 arc seconds."
)


def markdown(data: dict[str, Any]) -> str:
    """The tables for the documentation."""
    lines = [_about(data), "", NOTE, ""]
    for title, head, rows in tables(data):
        lines += _table(f"## {title}", head, rows)
    for size, other in data.get("also", {}).items():
        lines += [f"## Detectors of {size}", "", _about(other), ""]
        for title, head, rows in tables(other):
            lines += _table(f"### {title} ({size})", head, rows)
    return "\n".join(lines)


def _table(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [title, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _html_table(title: str, head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<h2>{html.escape(title)}</h2><table><tr>{cells}</tr>{lines}</table>"


def page(data: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """One HTML page with tables and plots inside."""
    body = [f"<h1>Quality of alerts</h1><p>{html.escape(_about(data))}</p><p>{html.escape(NOTE)}</p>"]
    body += [_html_table(*table) for table in tables(data)]
    for size, other in data.get("also", {}).items():
        body.append(f"<h1>Detectors of {html.escape(size)}</h1><p>{html.escape(_about(other))}</p>")
        body += [_html_table(*table) for table in tables(other)]
    for name, content in pictures.items():
        code = base64.b64encode(content).decode()
        body.append(f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{code}"></p>')
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b222c}"
        "table{border-collapse:collapse}td,th{padding:.2rem .7rem;border-bottom:1px solid #ccd;text-align:left}"
        "img{max-width:100%}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Quality of alerts</title>'
        f"<style>{style}</style></head><body>{''.join(body)}</body></html>"
    )
