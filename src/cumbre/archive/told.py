"""Files as they were when they came to a place, by the hops of then: one that has rotted since is no truth."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from cumbre.archive.protocol import Parcel
from cumbre.capture.hops import HOP_TOPIC
from cumbre.capture.keys import RawKey
from cumbre.core.time import day_obs_start_tai
from cumbre.stores.files import normal_checksum

if TYPE_CHECKING:
    from cumbre.bus import Bus


def told_parcels(bus: Bus, hop: str, place: str, raw: Path, keys: Collection[RawKey]) -> dict[str, Parcel]:
    """What the bus tells of some files of a raw cache, by key; files that it does not know are left out.

    Parameters
    ----------
    hop
        The hop that says that a file is there, e.g. ``at_base``.
    """
    days = [key.obs_id.day_obs for key in keys if key.is_detector]
    if not days:
        return {}
    wanted, found = {str(key) for key in keys}, dict[str, Parcel]()
    for message in bus.replay([HOP_TOPIC], since_tai=day_obs_start_tai(min(days))):
        fields = message.fields
        if (fields["hop"], fields["outcome"], fields["place"]) != (hop, "ok", place):
            continue
        path = Path(fields["path"])
        key = str(path.relative_to(raw)) if path.is_relative_to(raw) else ""
        if key in wanted and fields["checksum"]:
            checksum = normal_checksum(fields["checksum"])
            found[key] = Parcel(key, fields["byteSize"], checksum, fields["groupId"])
    return found
