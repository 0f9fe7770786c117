"""An S3 endpoint for the tests: the one of ``CUMBRE_TEST_S3``, else moto's server as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def endpoint(folder: Path) -> Iterator[str]:
    """URL of a real HTTP server that speaks S3; its log is in ``folder``."""
    given = os.environ.get("CUMBRE_TEST_S3")
    if given:
        yield given
        return
    log = folder / "s3.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-u", "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        process.wait(10)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    import time

    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if found:
            return found.group()
        time.sleep(0.05)
    raise AssertionError(f"the S3 server did not start: {log.read_text()[-500:]}")
