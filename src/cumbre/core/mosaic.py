"""Compact forms of instrument descriptions: amplifier layouts and detector grids written once.

In a description file, ``detectors`` may be a list, and each item may say ``type: NAME`` to take the keys of
``detector_types.NAME``. A detector type may describe its amplifiers by a ``grid`` instead of one by one::

    detector_types:
      ccd1k:
        nx: 1024
        ny: 1024
        pixel_mm: 0.015
        grid: {columns: 4, rows: 2, prescan: 4, overscan: 32, gain: 1.5, read_noise: 6, saturation: 55000,
               bias_level: 1000, linearity: [-1.0e-7], crosstalk: 1.0e-4}

Of a grid's amplifiers, row 0 (``C0x``) is the lower one. ``flip_x`` and ``flip_y`` may be one value or one
for each row; ``order`` lists the amplifiers' names in the order of the file's HDUs; ``first_row: 1`` names a
single row ``C1x``. ``mosaics`` lists rafts of detectors: see :func:`_mosaic`.
"""

from __future__ import annotations

from typing import Any

from cumbre.core.errors import ConfigurationError


def _by_row(value: Any, rows: int) -> list[bool]:
    """One flag for each row of a grid."""
    return list(value) if isinstance(value, list) else [bool(value)] * rows


def _grid(kind: dict[str, Any], where: str) -> dict[str, Any]:
    """Amplifiers of a regular grid; the upper half reads upwards, the lower half downwards."""
    grid = dict(kind["grid"])
    nx, ny = int(kind["nx"]), int(kind["ny"])
    columns, rows = int(grid.pop("columns")), int(grid.pop("rows"))
    prescan, overscan = int(grid.pop("prescan", 0)), int(grid.pop("overscan", 0))
    parallel = int(grid.pop("parallel_overscan", 0))
    coupling = float(grid.pop("crosstalk", 0.0))
    names = grid.pop("names", None)
    first_row = int(grid.pop("first_row", 0))
    order = grid.pop("order", None)
    flip_x = _by_row(grid.pop("flip_x", False), rows)
    # By default the upper half is read upwards and the lower half downwards.
    flip_y = _by_row(grid.pop("flip_y", [*[False] * (rows - 1), rows > 1]), rows)
    if nx % columns or ny % rows:
        raise ConfigurationError(f"{where}: grid {columns} x {rows} does not divide {nx} x {ny} pixels")
    width, height = nx // columns, ny // rows
    amplifiers: list[dict[str, Any]] = []
    for row in range(rows):
        for column in range(columns):
            index = len(amplifiers)
            # Segment names as the LSST sensors have them: C1x is the upper row, C0x the lower one.
            name = names[index] if names else f"C{row + first_row}{column}"
            item = {
                "name": name,
                "detector_box": [column * width, (column + 1) * width, row * height, (row + 1) * height],
                "raw_box": [prescan, prescan + width, 0, height],
                "flip_x": flip_x[row],
                "flip_y": flip_y[row],
                "hdu": f"Segment{name.removeprefix('C')}",
            }
            if overscan:
                item["overscan_box"] = [prescan + width, prescan + width + overscan, 0, height]
            if prescan:
                item["prescan_box"] = [0, prescan, 0, height]
            if parallel:
                item["parallel_overscan_box"] = [prescan, prescan + width, height, height + parallel]
            for key, value in grid.items():
                item[key] = value[index] if key != "linearity" and isinstance(value, list) else value
            amplifiers.append(item)
    if order is not None:
        by_name = {item["name"]: item for item in amplifiers}
        if sorted(order) != sorted(by_name):
            raise ConfigurationError(
                f"{where}: grid.order must name each of {', '.join(sorted(by_name))} once"
            )
        amplifiers = [by_name[name] for name in order]
    out = {key: value for key, value in kind.items() if key != "grid"}
    out["amplifiers"] = amplifiers
    if coupling:
        n = len(amplifiers)
        # Neighbouring channels couple most; the strength halves with each step between them.
        out["crosstalk"] = [
            [0.0 if i == j else coupling * 0.5 ** (abs(i - j) - 1) for j in range(n)] for i in range(n)
        ]
    return out


def _mosaic(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Detectors of rafts: ``rafts: {R22: [x_mm, y_mm]}``, ``slots: {S11: [dx_mm, dy_mm]}``, ``first_id``."""
    out = []
    identifier = int(spec.get("first_id", 0))
    common = {k: v for k, v in spec.items() if k not in ("rafts", "slots", "first_id")}
    for raft, (raft_x, raft_y) in spec["rafts"].items():
        for slot, (slot_x, slot_y) in spec["slots"].items():
            out.append(
                common
                | {
                    "id": identifier,
                    "name": f"{raft}_{slot}",
                    "x_offset_mm": raft_x + slot_x,
                    "y_offset_mm": raft_y + slot_y,
                }
            )
            identifier += 1
    return out


def expand(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Replace the compact forms by plain detectors.

    Raises
    ------
    ConfigurationError
        A ``type`` that is not described, or a grid that does not divide its detector.
    """
    out = {key: value for key, value in data.items() if key not in ("detector_types", "mosaics")}
    kinds: dict[str, Any] = data.get("detector_types") or {}
    detectors = list(data.get("detectors") or [])
    for spec in data.get("mosaics") or []:
        detectors += _mosaic(spec)
    expanded = []
    for detector in detectors:
        item = dict(detector)
        if "type" in item:
            kind = item.pop("type")
            if kind not in kinds:
                raise ConfigurationError(
                    f"{where}: detectors.{item.get('name', '?')}.type = {kind!r}: expected one of "
                    f"{', '.join(kinds) or 'detector_types (there are none)'}"
                )
            item = dict(kinds[kind]) | item
        if "grid" in item:
            item = _grid(item, where)
        expanded.append(item)
    out["detectors"] = sorted(expanded, key=lambda item: item.get("id", 0))
    return out
