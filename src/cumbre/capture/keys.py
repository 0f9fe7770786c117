"""Keys of raw files: the only form of a path that crosses a network or a folder of another machine."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cumbre.core.errors import BadFileError, UserError
from cumbre.core.ids import ObsId, image_folder

MAX_KEY_CHARS = 240
_KEY = re.compile(
    r"(?P<instrument>[A-Za-z][A-Za-z0-9_-]{0,31})/(?P<day_obs>[0-9]{8})/"
    r"(?P<obs_id>[A-Z]{2}_[A-Z]_(?P=day_obs)_[0-9]{6})/"
    r"(?P=obs_id)_(?P<part>[A-Za-z0-9][A-Za-z0-9_]{0,47})\.(?P<suffix>fits(?:\.gz|\.bz2|\.fz)?|json)"
)
SIDECAR_PART = "header"


@dataclass(frozen=True, slots=True)
class RawKey:
    """``instrument/day_obs/obs_id/obs_id_part.suffix``; ``part`` is a detector's name or a sidecar's kind."""

    instrument: str
    obs_id: ObsId
    part: str
    suffix: str

    @classmethod
    def parse(cls, text: str) -> RawKey:
        """Read and validate a key.

        Raises
        ------
        BadFileError
            The key has another form: absolute, with ``..``, with foreign characters, or too long.
        """
        match = _KEY.fullmatch(text) if len(text) <= MAX_KEY_CHARS else None
        if match is None:
            raise BadFileError(
                f"key {text[:MAX_KEY_CHARS]!r}: expected instrument/day_obs/obs_id/obs_id_part.fits or .json"
            )
        try:
            obs_id = ObsId.parse(match["obs_id"])
        except UserError as error:
            raise BadFileError(f"key {text!r}: {error}") from error
        return cls(match["instrument"], obs_id, match["part"], match["suffix"])

    def __str__(self) -> str:
        return f"{image_folder(self.instrument, self.obs_id)}/{self.obs_id}_{self.part}.{self.suffix}"

    @property
    def is_detector(self) -> bool:
        """True for pixels, false for manifests and sidecars."""
        return self.suffix != "json"

    @property
    def order(self) -> tuple[int, int, str, bool, str]:
        """Oldest image first; within an image the small sidecars first."""
        return self.obs_id.day_obs, self.obs_id.seq_num, self.obs_id.prefix, self.is_detector, self.part


def sidecar_key(instrument: str, obs_id: ObsId) -> str:
    """Relative path of an image's header sidecar."""
    return f"{image_folder(instrument, obs_id)}/{obs_id}_{SIDECAR_PART}.json"
