"""The supervisor with real processes: restart after kill -9, one supervisor a site, a clean end."""

from __future__ import annotations

import os
import signal
import time

import pytest

from cumbre.core.configuration import Site
from cumbre.core.errors import ConfigurationError, ConflictError
from cumbre.site.profiles import create_site
from cumbre.site.roles import roles_of
from cumbre.site.supervisor import alive, read_state, start_detached, stop_site


@pytest.fixture
def site(tmp_path):
    root = tmp_path / "site"
    create_site(root)
    path = root / "site.yaml"
    path.write_text(path.read_text() + "roles: [headers, writer]\n")
    site = Site.load(root)
    yield site
    stop_site(site)


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def pid_of(site, name):
    state = read_state(site)
    return next((s["pid"] for s in state["services"] if s["name"] == name), None) if state else None


def test_a_killed_service_comes_back_and_the_site_ends_clean(site):
    start_detached(site)
    first = pid_of(site, "writer-1")
    with pytest.raises(ConflictError, match="up already"):
        start_detached(site)
    os.kill(first, signal.SIGKILL)
    second = wait_for(lambda: (p := pid_of(site, "writer-1")) not in (None, first) and p)
    services = read_state(site)["services"]
    assert next(s["restarts"] for s in services if s["name"] == "writer-1") == 1
    assert stop_site(site)
    assert read_state(site) is None
    for pid in (second, *(s["pid"] for s in services)):
        assert not alive(pid)
    assert not stop_site(site)


def test_a_killed_supervisor_takes_its_services_along(site):
    start_detached(site)
    services = [s["pid"] for s in read_state(site)["services"] if s["name"] != "postgres"]
    os.kill(read_state(site)["pid"], signal.SIGKILL)
    wait_for(lambda: not any(alive(pid) for pid in services))
    assert read_state(site) is None
    start_detached(site)
    assert pid_of(site, "writer-1") not in services


def test_unknown_roles_are_named(site):
    site.config.roles = ["writer", "cook"]
    with pytest.raises(ConfigurationError, match="cook"):
        roles_of(site)


def test_a_service_that_outlives_its_supervisor_is_ended_by_the_next(site):
    start_detached(site)
    hung = pid_of(site, "writer-1")
    os.kill(hung, signal.SIGSTOP)  # it cannot obey when its supervisor dies
    os.kill(read_state(site)["pid"], signal.SIGKILL)
    wait_for(lambda: read_state(site) is None)
    assert alive(hung)
    start_detached(site)
    assert not alive(hung)
    assert pid_of(site, "writer-1") != hung
