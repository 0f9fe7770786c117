"""Uploads by URL: a table that lies on another server, fetched without becoming anybody's tool.

The name is resolved once, every address must be one of the open internet (unless the site allows the host), and
the connection goes to that very address. No redirects, bounded bytes, bounded time.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from cumbre.access.http.base import TooLargeError, UsageError

TIMEOUT_S = 20.0
BLOCK = 1 << 16


class _Pinned(http.client.HTTPConnection):
    """A connection to an address that was checked before."""

    def __init__(self, host: str, port: int, address: str, *, tls: bool) -> None:
        super().__init__(host, port, timeout=TIMEOUT_S)
        self._address, self._tls = address, tls

    def connect(self) -> None:
        """Connect to the address, not to what the name means by now."""
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._tls:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


def fetch_table(url: str, limit_bytes: int, allowed_hosts: Collection[str] = ()) -> bytes:
    """Content of a URL.

    Parameters
    ----------
    limit_bytes
        Most bytes that are taken.
    allowed_hosts
        Hosts that may be on a private network.

    Raises
    ------
    UsageError
        The URL is none of http and https, leads into a private network, or gives no table.
    TooLargeError
        More bytes than are taken.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.username:
        raise UsageError(
            f"UPLOAD: {url[:100]!r}: expected param:FIELD, or an http or https URL without a password"
        )
    host, tls = parts.hostname, parts.scheme == "https"
    port = port or (443 if tls else 80)
    connection = _Pinned(host, port, _public_address(host, port, allowed_hosts), tls=tls)
    end = time.monotonic() + TIMEOUT_S
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept-Encoding": "identity", "User-Agent": "cumbre"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise UsageError(f"UPLOAD: {host} answers {answer.status}; give the URL of the table itself")
        content = bytearray()
        while block := answer.read(BLOCK):
            content += block
            if len(content) > limit_bytes:
                raise TooLargeError(f"UPLOAD: the table at {host} is larger than {limit_bytes:,} bytes")
            if time.monotonic() > end:
                raise UsageError(f"UPLOAD: {host} did not send the table within {TIMEOUT_S:g} s")
    except (OSError, http.client.HTTPException) as error:
        raise UsageError(f"UPLOAD: {host} cannot be read: {type(error).__name__}") from error
    finally:
        connection.close()
    return bytes(content)


def _public_address(host: str, port: int, allowed_hosts: Collection[str]) -> str:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"UPLOAD: the host {host[:80]!r} is not known") from error
    addresses = [str(item[4][0]) for item in found]
    if host.lower() in allowed_hosts:
        return addresses[0]
    for address in addresses:
        parsed = ipaddress.ip_address(address.partition("%")[0])
        mapped = getattr(parsed, "ipv4_mapped", None)
        if not (mapped or parsed).is_global or parsed.is_multicast:
            raise UsageError(
                f"UPLOAD: {host[:80]!r} is on a private network; send the table inline (UPLOAD=NAME,param:FIELD)"
            )
    return addresses[0]
