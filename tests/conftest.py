"""Fixtures that several rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cumbre.stores.postgres import Database
from support.pg import fresh_database, server


@pytest.fixture(scope="session")
def postgres_dsn() -> Iterator[str]:
    """DSN of one embedded server for the whole session."""
    with server() as dsn:
        yield dsn


@pytest.fixture
def database(postgres_dsn: str) -> Iterator[Database]:
    """A fresh, empty database."""
    with fresh_database(postgres_dsn) as opened:
        yield opened
