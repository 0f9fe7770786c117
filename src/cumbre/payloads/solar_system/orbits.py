"""Orbit files of the Minor Planet Center: MPCORB.DAT, and the JSON of single orbits (``mpc_orb``)."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import NotFoundError, UserError
from cumbre.payloads.solar_system.kepler import GAUSS_K, equatorial_from_ecliptic, state_from_perihelion

FloatArray = NDArray[np.float64]
Columns = dict[str, NDArray[Any]]
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUV"
_FIELDS = {
    "h": (8, 13), "g": (14, 19), "mean_anomaly": (26, 35), "argperi": (37, 46), "node": (48, 57), "i": (59, 68),
    "e": (70, 79), "mean_motion": (80, 91), "a": (92, 103),
}  # fmt: skip
"""Columns of MPCORB.DAT (from 0, end exclusive); angles in degrees, equinox J2000."""
_LEAST_LENGTH = 103
DEFAULT_G = 0.15


def object_id(packed: str) -> int:
    """Identifier of an object: the bytes of its packed designation (at most 8 ASCII characters) as a number.

    Raises
    ------
    UserError
        The designation does not fit.
    """
    raw = packed.strip().encode("ascii", "replace")
    if not 0 < len(raw) <= 8 or b"?" in raw:
        raise UserError(f"packed designation {packed!r}: expected 1 to 8 ASCII characters")
    return int.from_bytes(raw, "big")


def packed_designation(identifier: int) -> str:
    """The packed designation that an identifier was made of."""
    return identifier.to_bytes(8, "big").lstrip(b"\0").decode("ascii")


@dataclass(frozen=True, slots=True, eq=False)
class Orbits:
    """States of n objects.

    Attributes
    ----------
    ids
        :func:`object_id`, int64, shape (n,).
    states
        Heliocentric position and velocity, ICRS axes, au and au/day, shape (n, 6).
    epochs
        MJD TT, shape (n,).
    h, g
        Absolute magnitude (NaN where not known) and slope, shape (n,).
    """

    ids: NDArray[np.int64]
    states: FloatArray
    epochs: FloatArray
    h: FloatArray
    g: FloatArray

    @classmethod
    def of_columns(cls, columns: Columns) -> Orbits:
        """States of orbits by elements.

        Parameters
        ----------
        columns
            ``ssObjectId``, ``q`` (au), ``e``, ``i``, ``node``, ``argperi`` (degrees), ``peri_time`` and ``epoch_mjd``
            (MJD TT), ``h``, ``g``, as :func:`read_orbits` gives them.
        """
        i, node, argperi = (np.radians(columns[name]) for name in ("i", "node", "argperi"))
        days = columns["epoch_mjd"] - columns["peri_time"]
        position, velocity = state_from_perihelion(columns["q"], columns["e"], i, node, argperi, days)
        states = np.hstack([equatorial_from_ecliptic(position), equatorial_from_ecliptic(velocity)])
        g = np.where(np.isfinite(columns["g"]), columns["g"], DEFAULT_G)
        return cls(columns["ssObjectId"], states, columns["epoch_mjd"].astype(float), columns["h"], g)


def read_orbits(path: Path) -> Columns:
    """Orbits of a file.

    Parameters
    ----------
    path
        MPCORB.DAT in the Center's fixed columns, or a JSON file of one orbit or a list (``mpc_orb``); also ``.gz``.

    Returns
    -------
    dict of arrays
        Columns of ``mpc_orbits`` (elements heliocentric, ecliptic of J2000, degrees, au, MJD TT; NaN where not known)
        and ``ssObjectId``; each shape (n,).

    Raises
    ------
    NotFoundError
        No such file.
    UserError
        The file holds no orbit that can be read.
    """
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {error}") from error
    if content.lstrip()[:1] in (b"{", b"["):
        return _read_json(content, path)
    return _read_mpcorb(content, path)


def _read_mpcorb(content: bytes, path: Path) -> Columns:
    lines = content.split(b"\n")
    ruler = next((i for i, line in enumerate(lines[:200]) if line.startswith(b"-----")), -1)
    rows = np.array([line for line in lines[ruler + 1 :] if len(line) >= _LEAST_LENGTH], dtype="S202")
    if not rows.size:
        raise UserError(
            f"{path}: no orbit of at least {_LEAST_LENGTH} columns, expected MPCORB.DAT or mpc_orb JSON"
        )
    text = rows.view("S1").reshape(rows.size, -1)
    epoch = _epochs(_cut(text, 20, 25))
    found = {name: _floats(_cut(text, *place)) for name, place in _FIELDS.items()}
    packed = np.char.strip(_cut(text, 0, 7))
    bound = (found["e"] >= 0) & (found["e"] < 1) & (found["a"] > 0)
    sound = bound & np.isfinite(epoch) & (np.char.str_len(packed) > 0)
    for name in ("mean_anomaly", "argperi", "node", "i"):
        sound &= np.isfinite(found[name])
    if not sound.any():
        raise UserError(f"{path}: no line has sound elements in MPCORB's columns")
    found = {name: values[sound] for name, values in found.items()}
    motion = np.degrees(GAUSS_K) * found["a"] ** -1.5
    anomaly = (found["mean_anomaly"] + 180) % 360 - 180
    columns: Columns = found | {
        "mean_motion": motion,
        "period": 1 / motion * 360,
        "q": found["a"] * (1 - found["e"]),
        "epoch_mjd": epoch[sound],
        "peri_time": epoch[sound] - anomaly / motion,
        "nobs_total": _floats(_cut(text, 117, 122))[sound],
        "nopp": _floats(_cut(text, 123, 126))[sound],
        "u_param": _floats(_cut(text, 105, 106))[sound],
    }
    names = np.char.strip(_cut(text, 166, 194))[sound]
    columns["packed"] = packed[sound].astype(str)
    columns["designation"] = np.where(names == b"", packed[sound], names).astype(str)
    return _with_ids(columns, path)


def _cut(text: NDArray[np.bytes_], start: int, end: int) -> NDArray[np.bytes_]:
    return np.ascontiguousarray(text[:, start:end]).view(f"S{end - start}").ravel()


def _floats(field: NDArray[np.bytes_]) -> FloatArray:
    """Numbers, NaN where there is none."""
    stripped = np.char.strip(field)
    try:
        return np.where(stripped == b"", b"nan", stripped).astype(float)
    except ValueError:
        return np.array([_number(value) for value in stripped.tolist()])


def _number(value: bytes) -> float:
    try:
        return float(value)
    except ValueError:
        return float("nan")


def _epochs(field: NDArray[np.bytes_]) -> FloatArray:
    """MJD of packed dates such as ``K23BP`` (2023 November 25)."""
    known: dict[bytes, float] = {}
    for value in np.unique(field).tolist():
        text = value.decode("ascii", "replace")
        try:
            year = 100 * _DIGITS.index(text[0]) + int(text[1:3])
            month, day = _DIGITS.index(text[3]), _DIGITS.index(text[4])
            date = np.datetime64(f"{year:04d}-{month:02d}-{day:02d}")
        except (ValueError, IndexError):
            known[value] = float("nan")
            continue
        known[value] = float((date - np.datetime64("1858-11-17")).astype(int))
    return np.array([known[value] for value in field.tolist()])


def _read_json(content: bytes, path: Path) -> Columns:
    try:
        data = json.loads(content)
        rows = [_orbit_of(item) for item in (data if isinstance(data, list) else [data])]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not an orbit in the Center's JSON (mpc_orb): {error!r}") from error
    columns: Columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return _with_ids(columns, path)


def _orbit_of(item: dict[str, Any]) -> dict[str, Any]:
    names = item["COM"]["coefficient_names"]
    com = dict(zip(names, item["COM"]["coefficient_values"], strict=False))
    photometry = item.get("magnitude_data") or {}
    about = item["designation_data"]
    e, q = float(com["e"]), float(com["q"])
    a = q / (1 - e) if e < 1 else float("nan")
    motion = float(np.degrees(GAUSS_K) * a**-1.5)
    epoch, perihelion = float(item["epoch_data"]["epoch"]), float(com["peri_time"])
    return {
        "q": q, "e": e, "i": float(com["i"]), "node": float(com["node"]), "argperi": float(com["argperi"]), "a": a,
        "peri_time": perihelion, "epoch_mjd": epoch, "mean_motion": motion, "period": 360 / motion,
        "mean_anomaly": (motion * (epoch - perihelion)) % 360,
        "h": float(photometry.get("H") or "nan"), "g": float(photometry.get("G") or "nan"),
        "packed": about["packed_primary_provisional_designation"],
        "designation": about["unpacked_primary_provisional_designation"],
    }  # fmt: skip


def _with_ids(columns: Columns, path: Path) -> Columns:
    ids = np.array([object_id(text) for text in columns["packed"].tolist()], dtype=np.int64)
    _, first = np.unique(ids, return_index=True)
    if first.size < ids.size:
        raise UserError(f"{path}: {ids.size - first.size} designations stand twice, expected each once")
    return columns | {"ssObjectId": ids}
