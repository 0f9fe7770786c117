"""One running site for each module of tests, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from support.archive_world import World, serve
from support.pg import fresh_database


@pytest.fixture(scope="module")
def world(
    postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[World]:
    """A site with data; ``ACCESS`` of a module changes ``access`` of its configuration."""
    with (
        fresh_database(postgres_dsn) as database,
        serve(
            database, tmp_path_factory.mktemp("world") / "site", **getattr(request.module, "ACCESS", {})
        ) as made,
    ):
        yield made


@pytest.fixture
def client(world: World) -> Iterator[httpx.Client]:
    """Somebody unknown."""
    with httpx.Client(base_url=world.url, timeout=30) as opened:
        yield opened
