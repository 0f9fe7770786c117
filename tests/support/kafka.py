"""Kafka brokers inside librdkafka: the real protocol over TCP, reachable from any process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def mock_brokers() -> Iterator[str]:
    """host:port of the brokers while the block runs."""
    from confluent_kafka import Producer

    logger = logging.getLogger("librdkafka.mock")
    logger.setLevel(logging.CRITICAL)
    host = Producer(
        {"bootstrap.servers": "none", "test.mock.num.brokers": 1, "logger": logger, "log.queue": False}
    )
    yield ",".join(f"{b.host}:{b.port}" for b in host.list_topics(timeout=10).brokers.values())
    del host


def mock_url(servers: str, prefix: str) -> str:
    """URL of a bus there.

    The mock cannot create topics on demand of an admin client, and it answers an empty fetch only at the end of
    its wait; asking for a producer id takes it half a second.
    """
    return f"kafka://{servers}?prefix={prefix}&create=no&fetch.wait.max.ms=10&enable.idempotence=false"
