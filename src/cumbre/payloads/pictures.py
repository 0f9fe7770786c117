"""Small PNG pictures of images and plots, the same look everywhere; few colours, so that the files stay small."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BACK, CARD, INK, SOFT, GOOD, DOUBT = "#12161c", "#1b222c", "#dfe6ee", "#8fa0b3", "#6fd08c", "#ff9d5c"
_COLOURS = 96


def new_figure(width_in: float, height_in: float, dpi: int = 90) -> Figure:
    """A dark figure that belongs to no screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), dpi=dpi, facecolor=BACK, layout="constrained")


def style(axes: Any, title: str = "", *, grid: bool = False) -> None:
    """Colours of an axes."""
    axes.set_facecolor(CARD)
    axes.set_title(title, color=INK, fontsize=10)
    axes.tick_params(colors=SOFT, labelsize=8)
    axes.xaxis.label.set_color(SOFT)
    axes.yaxis.label.set_color(SOFT)
    for spine in axes.spines.values():
        spine.set_color("#33404f")
    if grid:
        axes.grid(color="#33404f", linewidth=0.5)


def shrink(image: NDArray[Any], longest: int) -> NDArray[np.float32]:
    """Block means, so that the longer side is at most ``longest`` pixels; NaN are left out."""
    step = max(1, -(-max(image.shape) // longest))
    ny, nx = (max(1, n // step) for n in image.shape)
    step_y, step_x = min(step, image.shape[0]), min(step, image.shape[1])
    part = np.asarray(image[: ny * step_y, : nx * step_x], np.float32)
    blocks = part.reshape(ny, step_y, nx, step_x)
    good = np.isfinite(blocks)
    count = good.sum(axis=(1, 3))
    total = np.where(good, blocks, 0).sum(axis=(1, 3))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def show(axes: Any, image: NDArray[Any], title: str, *, longest: int = 420, stretch: float = 5.0) -> None:
    """An image from 2.5 of its pixels' spreads below the sky to ``stretch`` above, y upwards, in its own pixels."""
    small = shrink(image, longest)
    finite = np.asarray(image)[np.isfinite(image)][::7]
    low, middle, high = np.percentile(finite, [16, 50, 84]) if finite.size else (0.0, 0.5, 1.0)
    spread = max(float(high - low) / 2, 1e-6)
    axes.imshow(
        small, origin="lower", cmap="gray", vmin=float(middle - 2.5 * spread), vmax=float(middle + stretch * spread),
        interpolation="nearest", extent=(-0.5, image.shape[1] - 0.5, -0.5, image.shape[0] - 0.5), aspect="auto",
    )  # fmt: skip
    style(axes, title)


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure atomically as a PNG with a palette."""
    from PIL import Image

    from cumbre.stores.files import write_atomic

    full = io.BytesIO()
    figure.savefig(full, format="png", facecolor=figure.get_facecolor())
    full.seek(0)
    with Image.open(full) as picture:
        small = picture.convert("RGB").quantize(
            _COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
        )
    packed = io.BytesIO()
    small.save(packed, format="png", optimize=True)
    write_atomic(path, packed.getvalue())
