"""A small S3 server on this machine: real HTTP, one bucket, conditional writes, checksums, object lock.

It stands in for a bucket where CUMBRE_TEST_S3 names none; it knows only what the stores use of S3.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class S3Double:
    """The server; ``objects`` maps (bucket, key) to bytes and headers. ``down`` makes it answer 503."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], tuple[bytes, dict[str, str]]] = {}
        self.down = False
        self.puts: list[str] = []
        handler = type("Handler", (_Handler,), {"double": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    double: S3Double

    def log_message(self, *_: Any) -> None:
        pass

    def _name(self) -> tuple[str, str]:
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        return bucket, key

    def _reply(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, code: int, word: str) -> None:
        body = f"<Error><Code>{word}</Code><Message>{word}</Message></Error>".encode()
        self._reply(code, b"" if self.command == "HEAD" else body, Content_Type="application/xml")

    def _is_down(self) -> bool:
        if self.double.down:
            self._fail(503, "SlowDown")
        return self.double.down

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._is_down():
            return
        name = self._name()
        if self.headers.get("If-None-Match") == "*" and name in self.double.objects:
            self._fail(412, "PreconditionFailed")
            return
        told = self.headers.get("x-amz-checksum-sha256")
        if told is not None and told != base64.b64encode(hashlib.sha256(body).digest()).decode():
            self._fail(400, "BadDigest")
            return
        if name in self.double.objects and self._is_locked(name):
            self._fail(403, "AccessDenied")
            return
        kept = {k.lower(): v for k, v in self.headers.items() if k.lower().startswith("x-amz-")}
        self.double.objects[name] = body, kept
        self.double.puts.append(name[1])
        self._reply(200, ETag='"x"')

    def _is_locked(self, name: tuple[str, str]) -> bool:
        return "x-amz-object-lock-retain-until-date" in self.double.objects[name][1]

    def do_HEAD(self) -> None:
        self._give()

    def do_GET(self) -> None:
        if "list-type" in urlsplit(self.path).query:
            self._list()
        else:
            self._give()

    def _give(self) -> None:
        if self._is_down():
            return
        found = self.double.objects.get(self._name())
        if found is None:
            self._fail(404, "NoSuchKey")
            return
        body, kept = found
        meta = {k.replace("-", "_"): v for k, v in kept.items() if k.startswith("x-amz-meta-")}
        code = 200
        if wanted := self.headers.get("Range"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            body, code = body[int(start) : int(end) + 1], 206
        self._reply(code, body, Content_Length=str(len(body)), ETag='"x"', **meta)

    def _list(self) -> None:
        if self._is_down():
            return
        bucket = self._name()[0]
        prefix = parse_qs(urlsplit(self.path).query).get("prefix", [""])[0]
        keys = sorted(key for b, key in self.double.objects if b == bucket and key.startswith(prefix))
        rows = "".join(f"<Contents><Key>{escape(key)}</Key><Size>1</Size></Contents>" for key in keys)
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        self._reply(200, body.encode(), Content_Type="application/xml")

    def do_DELETE(self) -> None:
        if self._is_down():
            return
        name = self._name()
        if name in self.double.objects and self._is_locked(name):
            self._fail(403, "AccessDenied")
            return
        self.double.objects.pop(name, None)
        self._reply(204)
