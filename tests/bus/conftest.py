import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cumbre.bus import Bus, TopicCatalog, open_bus
from cumbre.core.time import Clock
from support.kafka import mock_url

NIGHT_TAI = 1_795_230_000.0  # in the night of 2026-11-20


class Place:
    """One bus, opened as often as a test likes; what was opened is closed at the end."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._open: list[Bus] = []

    def __call__(self, identity: str = "test", topics: TopicCatalog | None = None) -> Bus:
        bus = open_bus(self.url, identity=identity, clock=Clock.starting_at(NIGHT_TAI, rate=1), topics=topics)
        self._open.append(bus)
        return bus

    def close(self) -> None:
        for bus in self._open:
            bus.close()


EXTERNAL = os.environ.get("CUMBRE_TEST_KAFKA", "")
"""host:port of a real broker to run the contract against as well; topics test.* are made on it."""
KINDS = ["embedded", "kafka-mock", *(["kafka"] if EXTERNAL else [])]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Bus]]:
    prefix = f"test.{uuid.uuid4().hex[:12]}"
    if request.param == "embedded":
        url = f"sqlite://{tmp_path}/bus.db"
    elif request.param == "kafka-mock":
        url = mock_url(request.getfixturevalue("mock_servers"), prefix)
    else:
        url = f"kafka://{EXTERNAL}?prefix={prefix}"
    opened = Place(url)
    yield opened
    opened.close()
