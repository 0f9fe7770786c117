"""Where the receivers of a site listen: small files in its ``run`` folder, and the way a link goes."""

from __future__ import annotations

from cumbre.archive.pairs import distributor_name
from cumbre.core.configuration import Link, Site
from cumbre.core.errors import NotFoundError, TransientError
from cumbre.stores.files import write_atomic

Address = tuple[str, int]


def parse_address(text: str) -> Address:
    """``host:port``.

    Raises
    ------
    ValueError
        Another form.
    """
    host, _, port = text.strip().rpartition(":")
    return host, int(port)


def write_address(site: Site, name: str, address: Address) -> None:
    """Tell the others where a service listens: ``run/<name>.addr``."""
    write_atomic(site.path(f"run/{name}.addr"), f"{address[0]}:{address[1]}\n".encode())


def read_address(site: Site, name: str) -> Address:
    """Where a service listens.

    Raises
    ------
    TransientError
        It has not started yet.
    """
    path = site.path(f"run/{name}.addr")
    try:
        return parse_address(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise TransientError(f"{path}: {name} is not listening yet ({error})") from error


def link_of(site: Site, source: str, target: str) -> Link:
    """The configured link between two places.

    Raises
    ------
    NotFoundError
        There is none.
    """
    for link in site.config.links:
        if (link.source, link.target) == (source, target):
            return link
    raise NotFoundError(f"{site.root}: links: no link {source} → {target} in site.yaml")


def route(site: Site, source: str, target: str, pair: int = 1) -> Address:
    """Where a pair's sender connects: the simulated network where the site is simulated, else the receiver.

    Raises
    ------
    TransientError
        What it leads through is not listening yet.
    """
    link = link_of(site, source, target)
    if site.config.simulator is not None and (link.latency_ms or link.bandwidth_mbit_s):
        return read_address(site, f"wan-{source}-{target}-{pair}")
    if link.addresses:
        return parse_address(link.addresses[(pair - 1) % len(link.addresses)])
    return read_address(site, distributor_name(target, pair))
