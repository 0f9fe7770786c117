"""The page of ``cumbre process``: pictures, stamps and numbers in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.payloads.difference import UNUSABLE
from cumbre.payloads.processing import DifferenceResult, cutout

BACK, CARD, INK, SOFT, GOOD, DOUBT = "#12161c", "#1b222c", "#dfe6ee", "#8fa0b3", "#6fd08c", "#ff9d5c"
N_STAMPS = 24
_COLUMNS = ("id", "ra", "dec", "x", "y", "snr", "flux", "fluxErr", "reliability", "isNegative", "isDipole")


def build_page(result: DifferenceResult, summary: dict[str, Any], *, threshold: float = 0.5) -> bytes:
    """The report as UTF-8 HTML.

    Parameters
    ----------
    result
        What was found.
    summary
        Output of the run (its numbers are shown as they are).
    threshold
        Reliability from which a source is drawn as reliable.
    """
    sources = result.sources
    good = sources[sources["reliability"] >= threshold]
    title = f"{len(good)} reliable of {len(sources)} detections"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        (
            f"<p class=soft>{html.escape(str(summary.get('science_name', '')))} minus "
            f"{html.escape(str(summary.get('reference_name', '')))}. Circles: green = reliable, orange dotted = "
            "doubtful (first 200). Fluxes in science-image units.</p>"
        ),
        "<section class=three>",
    ]
    for name, plane in _planes(result):
        picture = _picture(plane, sources, threshold, is_difference=name == "difference")
        parts.append(
            f"<figure><img alt='{name} image' src='{picture}'><figcaption>{name}</figcaption></figure>"
        )
    parts.append(
        "</section><h2>Best sources</h2><p class=soft>science, template, difference; north as in the image</p>"
    )
    parts.append("<section class=stamps>")
    best = good if len(good) else sources
    for row in best[:N_STAMPS]:
        parts.append(
            f"<figure><img alt='stamps of source {row['id']}' src='{_triplet(result, row)}'><figcaption>#{row['id']} "
            f"({row['x']:.1f}, {row['y']:.1f}) &middot; S/N {row['snr']:.1f} &middot; flux {row['flux']:.4g} &middot; "
            f"r = {row['reliability']:.2f}</figcaption></figure>"
        )
    parts.append("</section>" if len(best) else "<p>Nothing was detected.</p></section>")
    parts += ["<h2>Reliable sources</h2>", _table(good), "<h2>Numbers</h2>", _numbers(summary)]
    return _wrap(title, "\n".join(parts)).encode()


def _planes(result: DifferenceResult) -> list[tuple[str, NDArray[np.float32]]]:
    made = result.difference
    shown = np.where((result.exposure.mask & UNUSABLE) > 0, np.nan, result.exposure.image)
    return [("science", made.science.image), ("template", made.template.image), ("difference", shown)]


def _limits(image: NDArray[np.float32]) -> tuple[float, float]:
    sample = image[np.isfinite(image)][:: max(1, image.size // 200_000)]
    if sample.size == 0:
        return 0.0, 1.0
    middle = float(np.median(sample))
    spread = float(1.4826 * np.median(np.abs(sample - middle))) or 1.0
    return middle, spread


def _stretched(image: NDArray[np.float32], *, is_difference: bool) -> NDArray[np.float64]:
    """0…1: linear ±5 sigma for a difference, asinh for direct images."""
    middle, spread = _limits(image)
    scaled = (np.nan_to_num(image, nan=middle) - middle) / spread
    if is_difference:
        return np.asarray(np.clip((scaled + 5) / 10, 0, 1))
    return np.asarray(np.clip(np.arcsinh(np.maximum(scaled + 1.5, 0) / 2) / np.arcsinh(150), 0, 1))


def _shrunk(image: NDArray[np.float64], factor: int) -> NDArray[np.float64]:
    if factor == 1:
        return image
    ny, nx = (n // factor * factor for n in image.shape)
    blocks = image[:ny, :nx].reshape(ny // factor, factor, nx // factor, factor)
    return np.asarray(blocks.mean(axis=(1, 3)))


def _picture(
    image: NDArray[np.float32], sources: NDArray[Any], threshold: float, *, is_difference: bool
) -> str:
    from matplotlib.figure import Figure

    factor = max(1, round(max(image.shape) / 900))
    small = _shrunk(_stretched(image, is_difference=is_difference), factor)
    figure = Figure(figsize=(6, 6 * small.shape[0] / small.shape[1]), dpi=130, facecolor=BACK)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(small, cmap="gray", vmin=0, vmax=1, origin="lower", interpolation="nearest",
                extent=(-0.5, image.shape[1] - 0.5, -0.5, image.shape[0] - 0.5))  # fmt: skip
    reliable = sources["reliability"] >= threshold
    size = 90.0
    axes.scatter(
        sources["x"][reliable],
        sources["y"][reliable],
        s=size,
        facecolors="none",
        edgecolors=GOOD,
        linewidths=1.0,
    )
    doubtful = sources[~reliable][:200]
    axes.scatter(
        doubtful["x"],
        doubtful["y"],
        s=size * 0.5,
        facecolors="none",
        edgecolors=DOUBT,
        linewidths=0.6,
        linestyles=":",
    )
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    axes.set_ylim(-0.5, image.shape[0] - 0.5)
    axes.set_axis_off()
    return _encoded(figure)


def _triplet(result: DifferenceResult, row: Any, half: int = 20) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0, 1.0), dpi=100, facecolor=BACK)
    noise = result.metrics.get("noise", 1.0) or 1.0
    made = result.difference
    planes = (made.science.image, made.template.image, result.exposure.image)
    top = max(10 * noise, float(np.nanmax(cutout(made.science.image, row["x"], row["y"], 4))))
    for index, plane in enumerate(planes):
        axes = figure.add_axes((index / 3 + 0.005, 0.01, 0.323, 0.98))
        stamp = np.nan_to_num(cutout(plane, row["x"], row["y"], half))
        if index < 2:
            axes.imshow(
                np.arcsinh(stamp / (2 * noise)),
                cmap="gray",
                origin="lower",
                vmin=-1,
                vmax=np.arcsinh(top / (2 * noise)),
            )
        else:
            reach = max(5 * noise, 0.5 * float(np.abs(stamp[half - 4 : half + 5, half - 4 : half + 5]).max()))
            axes.imshow(stamp, cmap="gray", origin="lower", vmin=-reach, vmax=reach)
        axes.set_axis_off()
    return _encoded(figure)


def _encoded(figure: Any) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor=BACK)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _table(rows: NDArray[Any]) -> str:
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    body = []
    for row in rows[:500]:
        cells = []
        for name in _COLUMNS:
            value = row[name]
            digits = {"ra": 6, "dec": 6, "reliability": 2, "x": 2, "y": 2, "snr": 1, "flux": 1, "fluxErr": 1}
            cells.append(f"{float(value):.{digits[name]}f}" if name in digits else str(value))
        body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<div class=wide><table><tr>{head}</tr>{''.join(body)}</table></div>"


def _numbers(summary: dict[str, Any]) -> str:
    rows = []
    for key, value in summary.items():
        if isinstance(value, dict):
            rows += [(f"{key}.{name}", number) for name, number in value.items()]
        else:
            rows.append((key, value))
    cells = "".join(
        f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(f'{v:.5g}' if isinstance(v, float) else str(v))}</td></tr>"
        for k, v in rows
    )
    return f"<table>{cells}</table>"


def _wrap(title: str, body: str) -> str:
    style = (
        f"body{{background:{BACK};color:{INK};font:15px/1.45 system-ui,sans-serif;margin:24px auto;"
        "max-width:1500px;padding:0 16px}"
        f".soft,figcaption{{color:{SOFT};font-size:13px}}figure{{margin:0}}img{{width:100%;display:block;border-radius:4px}}"
        ".three{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:12px}"
        ".stamps{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:12px}"
        f"table{{border-collapse:collapse;background:{CARD}}}td,th{{padding:3px 10px;text-align:right;"
        f"border-bottom:1px solid {BACK};"
        "font-variant-numeric:tabular-nums}td:first-child,th:first-child{text-align:left}.wide{overflow-x:auto}"
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>cumbre process: {html.escape(title)}</title><style>{style}</style><body>{body}</body></html>"
    )
