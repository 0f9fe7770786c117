"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from uuid import uuid4

import pytest

from cumbre.stores.postgres import Database
from support.kafka import mock_brokers
from support.pg import fresh_database, server
from support.s3 import endpoint


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


@pytest.fixture(scope="session")
def mock_servers() -> Iterator[str]:
    """host:port of Kafka brokers inside librdkafka."""
    with mock_brokers() as servers:
        yield servers


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of one S3 server for the whole session."""
    with endpoint(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a new bucket; the environment says where its server is."""
    import boto3

    monkeypatch.setenv("S3_ENDPOINT_URL", s3_server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, os.environ.get(name, "testing"))
    bucket = f"cumbre-test-{uuid4().hex[:8]}"
    boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(Bucket=bucket)
    return bucket
