"""A client of a TAP service that looks at nothing but times and bytes."""

from __future__ import annotations

import http.client
import statistics
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import numpy as np

CONES = 40
JOBS = 15
JOB_S = 60.0


class Service:
    """A service with TAP below an address.

    Parameters
    ----------
    url
        Address; TAP is at ``url/tap``.
    """

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self._host, self._prefix = parts.netloc, parts.path.rstrip("/")

    def fetch(
        self, path: str, form: dict[str, str] | None = None, body: bytes = b"", kind: str = ""
    ) -> dict[str, Any]:
        """One request: seconds to the first byte and to the last, bytes, the end of the document."""
        link = http.client.HTTPConnection(self._host, timeout=600)
        content = urllib.parse.urlencode(form).encode() if form is not None else body
        headers = {"Content-Type": kind or "application/x-www-form-urlencoded"} if content else {}
        begin = time.perf_counter()
        link.request("POST" if content else "GET", self._prefix + path, content or None, headers)
        answer = link.getresponse()
        buffer, size, first, end, start = memoryview(bytearray(1 << 20)), 0, 0.0, b"", b""
        while count := answer.readinto(buffer):
            first = first or time.perf_counter() - begin
            size += count
            if len(start) < 4096:
                start += bytes(buffer[: min(count, 4096)])
            end = (end + bytes(buffer[max(0, count - 300) : count]))[-300:]
        seconds = time.perf_counter() - begin
        link.close()
        if answer.status >= 400 or b'value="ERROR"' in start + end:
            raise RuntimeError(f"{path}: {answer.status} {start[:400]!r} {end!r}")
        return {
            "seconds": seconds,
            "first": first,
            "bytes": size,
            "end": end,
            "start": start,
            "answer": answer,
        }

    def ask(self, query: str, **more: str) -> dict[str, Any]:
        """A query answered at once."""
        return self.fetch("/tap/sync", {"LANG": "ADQL", "REQUEST": "doQuery", "QUERY": query} | more)

    def times(self, calls: list[Callable[[], dict[str, Any]]]) -> dict[str, float]:
        """Wall times of many small requests; the first is made once before."""
        calls[0]()
        taken = sorted(call()["seconds"] for call in calls)
        return {
            "median_ms": round(1000 * statistics.median(taken), 1),
            "p95_ms": round(1000 * taken[int(0.95 * (len(taken) - 1))], 1),
            "best_ms": round(1000 * taken[0], 1),
        }

    def one_job(self, query: str, *, apart: bool = False) -> dict[str, Any]:
        """An asynchronous job from its making to its result.

        Parameters
        ----------
        apart
            It is told to run in a request of its own, for services that know no other way.

        Raises
        ------
        RuntimeError
            It does not end.
        """
        begin = time.perf_counter()
        form = {"LANG": "ADQL", "REQUEST": "doQuery", "QUERY": query}
        made = self.fetch("/tap/async", form if apart else form | {"PHASE": "RUN"})
        path = urllib.parse.urlsplit(made["answer"].getheader("Location")).path.removeprefix(self._prefix)
        if apart:
            self.fetch(f"{path}/phase", {"PHASE": "RUN"})
        while b">COMPLETED<" not in self.fetch(f"{path}?WAIT=10")["start"]:
            if time.perf_counter() - begin > JOB_S:
                raise RuntimeError(f"{path}: the job does not end")
        self.fetch(f"{path}/results/result")
        return {"seconds": time.perf_counter() - begin}


def centres(count: int = CONES, seed: int = 7) -> list[tuple[float, float]]:
    """Positions all over the sky, degrees."""
    rng = np.random.default_rng(seed)
    ra, z = rng.uniform(0, 360, count), rng.uniform(-1, 1, count)
    return [(float(a), float(np.degrees(np.arcsin(b)))) for a, b in zip(ra, z, strict=True)]


def multipart(query: str, content: bytes, name: str, **more: str) -> tuple[bytes, str]:
    """A form with the query and an uploaded table ``mine``; returns it and its media type."""
    parts = {"LANG": "ADQL", "REQUEST": "doQuery", "UPLOAD": "mine,param:mine", "QUERY": query} | more
    head = "".join(
        f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in parts.items()
    )
    head += f'--b\r\nContent-Disposition: form-data; name="mine"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"
