from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import camera_double
import pytest

from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.time import Clock
from cumbre.site.profiles import create_site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site with one writer node; several in the tests of nodes."""
    path = create_site(tmp_path / "site").path("site.yaml")
    path.write_text(path.read_text() + "capture: {writers: 1}\n")
    return Site.load(path.parent)


@pytest.fixture
def clock() -> Clock:
    return Clock.starting_at(camera_double.BEGIN_TAI + 32.0, rate=6.0)


@pytest.fixture
def bus(site: Site, clock: Clock) -> Iterator[Bus]:
    with camera_double.site_bus(site, "camera", clock) as opened:
        yield opened
