import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cumbre.bus import Bus, TopicCatalog, open_bus
from cumbre.core.time import Clock

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


@pytest.fixture(scope="session")
def mock_servers() -> Iterator[str]:
    """Brokers inside librdkafka: the real protocol over TCP, reachable from any process."""
    from confluent_kafka import Producer

    host = Producer(
        {"bootstrap.servers": "none", "test.mock.num.brokers": 1, "logger": _silent(), "log.queue": False}
    )
    yield ",".join(f"{b.host}:{b.port}" for b in host.list_topics(timeout=10).brokers.values())
    del host


def _silent():  # type: ignore[no-untyped-def]
    import logging

    logger = logging.getLogger("librdkafka.mock")
    logger.setLevel(logging.CRITICAL)
    return logger


EXTERNAL = os.environ.get("CUMBRE_TEST_KAFKA", "")
"""host:port of a real broker to run the contract against as well; topics test.* are made on it."""
KINDS = ["embedded", "kafka-mock", *(["kafka"] if EXTERNAL else [])]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Bus]]:
    prefix = f"test.{uuid.uuid4().hex[:12]}"
    if request.param == "embedded":
        url = f"sqlite://{tmp_path}/bus.db"
    elif request.param == "kafka-mock":
        # the mock cannot create topics on demand of an admin client, and it answers an empty fetch only at the
        # end of its wait; asking for a producer id takes it half a second
        servers = request.getfixturevalue("mock_servers")
        url = f"kafka://{servers}?prefix={prefix}&create=no&fetch.wait.max.ms=10&enable.idempotence=false"
    else:
        url = f"kafka://{EXTERNAL}?prefix={prefix}"
    opened = Place(url)
    yield opened
    opened.close()
