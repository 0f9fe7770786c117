"""The bus: every command, event and telemetry sample of the observatory, append-only, typed, stamped.

In: what services publish. Out: the same to whoever subscribed, and all of it again on :meth:`Bus.replay`.
Topics are data (``topics/*.yaml``). Events keep their last value for late joiners; commands and telemetry are
never given to them. Two buses with one contract: an embedded durable log (SQLite, several processes of one
machine) and Kafka (SAL topic names, Avro, Confluent wire format).
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from cumbre.bus.base import Bus, Start, Subscription
from cumbre.bus.messages import Ack, AckCode, Message
from cumbre.bus.topics import Topic, TopicCatalog, default_topics, load_topics
from cumbre.core.errors import ConfigurationError
from cumbre.core.time import Clock

__all__ = [
    "Ack", "AckCode", "Bus", "Message", "Start", "Subscription", "Topic", "TopicCatalog", "default_topics",
    "load_topics", "open_bus",
]  # fmt: skip


def open_bus(
    url: str, *, identity: str, clock: Clock | None = None, topics: TopicCatalog | None = None
) -> Bus:
    """Open the bus of a site.

    Parameters
    ----------
    url
        ``sqlite:///absolute/path/bus.db`` or ``kafka://host:port[,host:port]?prefix=lsst.sal`` (other
        parameters: see :class:`cumbre.bus.kafka.KafkaBus`).
    identity
        Who publishes: the service's name.
    clock
        Night time for the stamps; real time when not given.

    Raises
    ------
    ConfigurationError
        Another kind of address.
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if parts.scheme == "sqlite" and not parts.netloc and parts.path.startswith("/") and not options:
        from cumbre.bus.embedded import SqliteBus

        return SqliteBus(Path(parts.path), identity=identity, clock=clock, topics=topics)
    if parts.scheme == "kafka" and parts.netloc:
        from cumbre.bus.kafka import KafkaBus

        return KafkaBus(parts.netloc, identity=identity, clock=clock, topics=topics, **options)
    raise ConfigurationError(
        f"bus {url!r}: expected sqlite:///absolute/path/bus.db or kafka://host:port?prefix=lsst.sal"
    )
