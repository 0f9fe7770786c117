"""The database of a site that does not run."""

from __future__ import annotations

import pytest

from cumbre.core.configuration import Site
from cumbre.core.errors import NotFoundError
from cumbre.site.profiles import create_site
from cumbre.site.supervisor import site_database_of_any
from cumbre.stores.postgres import EmbeddedPostgres


def test_it_is_started_for_a_while_and_one_that_runs_is_left_running(tmp_path):
    create_site(tmp_path / "s")
    site = Site.load(tmp_path / "s")
    with pytest.raises(NotFoundError, match="it never ran"), site_database_of_any(site):
        pass
    postgres = EmbeddedPostgres(site.root / "postgres", durable=False)
    try:
        postgres.start()
        with site_database_of_any(site) as database:
            database.execute("CREATE TABLE kept AS SELECT 3 AS n")
        assert postgres.dsn_if_running() is not None
        postgres.stop()
        with site_database_of_any(site) as database:
            assert database.execute("SELECT n FROM kept") == [(3,)]
        assert postgres.dsn_if_running() is None
    finally:
        postgres.stop()
