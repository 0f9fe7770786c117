"""Identifiers: obs_id, exposure_id, visit, DiaSource ids.

``exposure_id = day_obs · 100000 + seq_num``. A visit has the number of its first exposure.
``obs_id = XX_O_YYYYMMDD_NNNNNN`` with the camera's two-letter prefix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cumbre.core.errors import UserError

_OBS_ID = re.compile(r"(?P<prefix>[A-Z]{2})_(?P<controller>[A-Z])_(?P<day_obs>\d{8})_(?P<seq_num>\d{6})")
MAX_SEQ_NUM = 99999
DETECTOR_BITS = 8
COUNTER_BITS = 14


@dataclass(frozen=True, slots=True, order=True)
class ObsId:
    """One exposure's identity, e.g. ``XC_O_20261120_000012``."""

    day_obs: int
    seq_num: int
    prefix: str
    controller: str = "O"

    @classmethod
    def parse(cls, text: str) -> ObsId:
        """Read ``XX_O_YYYYMMDD_NNNNNN``.

        Raises
        ------
        UserError
            The text has another form.
        """
        match = _OBS_ID.fullmatch(text)
        if match is None or not 1 <= int(match["seq_num"]) <= MAX_SEQ_NUM:
            raise UserError(f"obs_id {text!r}: expected XX_O_YYYYMMDD_NNNNNN, e.g. XC_O_20261120_000012")
        return cls(int(match["day_obs"]), int(match["seq_num"]), match["prefix"], match["controller"])

    def __str__(self) -> str:
        return f"{self.prefix}_{self.controller}_{self.day_obs:08d}_{self.seq_num:06d}"

    @property
    def exposure_id(self) -> int:
        """``day_obs · 100000 + seq_num``."""
        return self.day_obs * 100000 + self.seq_num


def visit_id(exposure_id: int, index: int) -> int:
    """Number of the visit of which an exposure is the ``index``-th, from 1: that of its first exposure.

    An index that the exposure's own number cannot have counts as 1.
    """
    seq_num = exposure_id % 100000
    return exposure_id - (index - 1) if 1 <= index <= seq_num else exposure_id


def split_exposure_id(exposure_id: int) -> tuple[int, int]:
    """(day_obs, seq_num) of an exposure id."""
    return divmod(exposure_id, 100000)


def source_id(exposure_id: int, detector: int, counter: int) -> int:
    """Id of a source of one detector image: exposure, detector and counter packed in 63 bits.

    Raises
    ------
    ValueError
        A part does not fit (detector < 256, counter < 16384, exposure id < 2^41).
    """
    if not (
        0 <= detector < 1 << DETECTOR_BITS
        and 0 <= counter < 1 << COUNTER_BITS
        and 0 <= exposure_id < 1 << (63 - DETECTOR_BITS - COUNTER_BITS)
    ):
        raise ValueError(f"no source id for exposure {exposure_id}, detector {detector}, counter {counter}")
    return (exposure_id << DETECTOR_BITS | detector) << COUNTER_BITS | counter


def split_source_id(identifier: int) -> tuple[int, int, int]:
    """(exposure_id, detector, counter) of a source id."""
    return (
        identifier >> DETECTOR_BITS + COUNTER_BITS,
        identifier >> COUNTER_BITS & (1 << DETECTOR_BITS) - 1,
        identifier & (1 << COUNTER_BITS) - 1,
    )


def image_folder(instrument: str, obs_id: ObsId) -> str:
    """Relative folder of one image's files in every store."""
    return f"{instrument}/{obs_id.day_obs}/{obs_id}"


def image_key(instrument: str, obs_id: ObsId, detector_name: str) -> str:
    """Relative path of one detector's raw file in every store."""
    return f"{image_folder(instrument, obs_id)}/{obs_id}_{detector_name}.fits"


def manifest_key(instrument: str, obs_id: ObsId) -> str:
    """Relative path of the manifest of detectors that an image must have."""
    return f"{image_folder(instrument, obs_id)}/{obs_id}_expectedSensors.json"
