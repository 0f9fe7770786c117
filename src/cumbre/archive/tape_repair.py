"""What a verification of a tape found: told to the ledger, and written again from good copies."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cumbre.archive.tape import tape_state
from cumbre.archive.tape_check import Report, good_copy
from cumbre.archive.tape_rewrite import request_rewrite
from cumbre.archive.tape_writer import TapeWriter
from cumbre.capture.hops import detector_ids, hop_fields, piece_of, publish_hops
from cumbre.capture.keys import RawKey
from cumbre.core.errors import BadFileError

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

SERVED_S = 60.0
POLL_S = 0.2


def tell_damage(site: Site, place: str, report: Report, *, bus: Bus, clock: Clock) -> None:
    """Tell the ledger of each damaged copy: it counts them no more."""
    ids, hops = detector_ids(site.config), []
    for finding, _ in report.damaged:
        key = RawKey.parse(finding.key)
        if key.is_detector:
            piece = piece_of(key.instrument, key.obs_id, key.part, ids)
            hops.append(
                hop_fields(
                    clock,
                    piece,
                    f"{place}_tape",
                    place=place,
                    outcome=BadFileError.outcome,
                    path=finding.place,
                    message=finding.message,
                )
            )
    if hops:
        publish_hops(bus, hops)


def repair(site: Site, place: str, report: Report, *, bus: Bus, clock: Clock) -> list[str]:
    """Ask the tape's writer for new copies of what is damaged; where none runs, be it for a moment.

    Parameters
    ----------
    report
        Its findings are marked with where the new copy came from.

    Returns
    -------
    list of str
        Keys of which this site has no good copy.
    """
    waiting, without = {}, []
    for finding, entry in report.damaged:
        found = good_copy(site, place, entry)
        if found is None:
            without.append(finding.key)
            continue
        waiting[request_rewrite(tape_state(site, place), entry, found[0])] = (finding, found[1])
    if waiting:
        end = time.monotonic() + SERVED_S
        writer = TapeWriter(site=site, bus=bus, clock=clock, place=place)
        try:
            while any(request.exists() for request in waiting) and time.monotonic() < end:
                writer.serve_rewrites()  # does nothing while the service holds the tape: then that one serves
                time.sleep(POLL_S)
        finally:
            writer.close()
    for request, (finding, origin) in waiting.items():
        if not request.exists():
            finding.repaired = origin
    return without
