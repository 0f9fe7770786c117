from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transfer_double import open_site_bus

from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.time import Clock
from cumbre.site.profiles import create_site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site whose links have one pair; more in the tests of pairs."""
    path = create_site(tmp_path / "site").path("site.yaml")
    text = path.read_text().replace("- {source:", "- {pairs: 1, source:")
    path.write_text(text.replace("control: true", "control: false"))
    return Site.load(path.parent)


@pytest.fixture
def clock(site: Site) -> Clock:
    made = Clock.starting_at(1_795_222_837.0, rate=6.0)
    made.save(site.clock_path)
    return made


@pytest.fixture
def bus(site: Site, clock: Clock) -> Iterator[Bus]:
    with open_site_bus(site, "test", clock) as opened:
        yield opened
