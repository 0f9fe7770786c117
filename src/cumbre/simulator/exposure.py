"""What the camera is asked to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExposureRequest:
    """One exposure: who, where, when, how long.

    Attributes
    ----------
    image_type
        OBJECT, BIAS, DARK or FLAT.
    filter
        Physical filter (or band) of the instrument.
    ra, dec, rotpa
        Boresight in degrees ICRS, position angle of the focal plane's +y axis.
    begin_tai
        Shutter opening, TAI seconds.
    """

    obs_id: str
    image_type: str
    exposure_s: float
    filter: str
    ra: float
    dec: float
    rotpa: float
    begin_tai: float
    group_id: str = ""

    @property
    def mid_tai(self) -> float:
        """Middle of the exposure, TAI seconds."""
        return self.begin_tai + 0.5 * self.exposure_s

    @property
    def is_open(self) -> bool:
        """Whether the shutter opens to the sky."""
        return self.image_type == "OBJECT"
