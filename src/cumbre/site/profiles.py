"""Profiles: the site files that ``cumbre init`` writes."""

from __future__ import annotations

from pathlib import Path

from cumbre.archive.certificates import make_certificates
from cumbre.core.configuration import SITE_FILE, Site, parse_site
from cumbre.core.errors import ConflictError
from cumbre.core.instrument import load_instrument
from cumbre.stores.files import write_atomic

ONE_MACHINE = """\
# A whole observatory on one machine. Every key: docs/reference/configuration.md
profile: one-machine
observatory:
  name: Cumbre demonstration
  latitude_deg: -30.2446
  longitude_deg: -70.7494
  elevation_m: 2663
instruments: [{instrument}]
database: embedded          # or postgresql://user@host/name
bus: embedded               # or kafka://host:port
places:
  summit:
    raw: summit/raw
    buffer: summit/buffer   # holds images while the link to the base is down
    repository: summit/repository
  base:
    raw: base/raw
    tape: base/tape
    buffer: base/buffer
    listen: 127.0.0.1:0
  archive:
    raw: archive/raw
    tape: archive/tape
    repository: archive/repository
    listen: 127.0.0.1:0
links:
  - {{source: summit, target: base, latency_ms: 1, bandwidth_mbit_s: 10000}}
  - {{source: base, target: archive, latency_ms: 60, bandwidth_mbit_s: 1000}}
archive:
  control: true             # replicators send what control's jobs say; false: all that is written
control:
  start:                    # what control enables by itself: docs/how-to/command-the-archiver.md
    Archiver: science
    CatchUpArchiver: science
    EfdReplicator: science
    AlertProductionCluster: science
tls:                        # links are encrypted and both ends are known: docs/how-to/secure-links.md
  authority: certificates/ca.crt
scheduler:
  exposure_s: 30
  snaps: 1                  # exposures of a visit: 2 with exposure_s: 15 for pairs
  cadence_s: 37
  notice_s: 22
  tiles: 3
  filters: [r]
prompt:
  workers: 2
  deadline_s: 60
retention:
  daq_days: 2
  raw_cache_days: 30
"""

SIMULATOR = """\
simulator:                  # delete this block at a real observatory
  seed: {seed}
  start: "{start}"
  rate: {rate}
"""


def create_site(
    root: Path,
    *,
    instrument: str = "democam",
    seed: int = 1,
    simulated: bool = True,
    start: str = "2026-11-21T01:00:00",
    rate: float = 6.0,
) -> Site:
    """Write a one-machine site's file and folder.

    Raises
    ------
    ConflictError
        A site is there already.
    NotFoundError
        No such instrument.
    """
    path = root / SITE_FILE
    if path.exists():
        raise ConflictError(f"{path}: a site is here already; choose another folder or delete this one")
    load_instrument(instrument)
    text = ONE_MACHINE.format(instrument=instrument)
    if simulated:
        text += SIMULATOR.format(seed=seed, start=start, rate=rate)
    config = parse_site(text, str(path))
    root.mkdir(parents=True, exist_ok=True)
    for folder in ("run", "logs", "bus", "report"):
        (root / folder).mkdir(exist_ok=True)
    make_certificates(root / "certificates", config.observatory.name, config.places)
    write_atomic(path, text.encode())
    return Site(root, config)
