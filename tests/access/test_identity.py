"""Tokens, groups, rights, limits: what must hold whoever tries."""

from __future__ import annotations

import json
import stat

import pytest

from cumbre.access.identity import (
    AuthenticationError,
    AuthorizationError,
    Identity,
    Principal,
    RateLimitError,
)
from cumbre.core.errors import NotFoundError, UserError


@pytest.fixture
def identity(database):
    return Identity(database)


def test_a_token_tells_who_and_what(identity):
    made = identity.create_token("vera", ["read:tap"], 30)
    who = identity.authenticate(made.token, "10.0.0.1")
    assert (who.account, who.scopes, who.rights) == ("vera", {"read:tap"}, {"public"})
    who.require("read:tap")
    with pytest.raises(AuthorizationError, match="read:image"):
        who.require("read:image")
    assert not who.is_administrator


def test_the_secret_is_nowhere_in_the_database(identity, database):
    made = identity.create_token("vera", ["read:tap"], 30)
    secret = made.token.split("_", 2)[2]
    for table in ("token", "audit", "account"):
        for row in database.query(f"SELECT t::text AS text FROM access.{table} t"):
            assert secret not in row["text"]
    assert secret not in repr(made)


@pytest.mark.parametrize("change", ["secret", "id", "cut", "longer", "nothing", "sql"])
def test_a_changed_token_is_refused(identity, change):
    token = identity.create_token("vera", ["read:tap"], 30).token
    other = {
        "secret": token[:-1] + ("A" if token[-1] != "A" else "B"),
        "id": token.replace(token[4:16], "0" * 12),
        "cut": token[:-1],
        "longer": token + "A",
        "nothing": "",
        "sql": "cmb_' OR 1=1 --_" + "A" * 43,
    }[change]
    with pytest.raises(AuthenticationError):
        identity.authenticate(other)


def test_revoked_expired_and_disabled_tokens_are_refused(identity, database):
    token = identity.create_token("vera", ["read:tap"], 30)
    identity.revoke(token.token_id)
    with pytest.raises(AuthenticationError, match="revoked"):
        identity.authenticate(token.token)
    late = identity.create_token("vera", ["read:tap"], 1)
    database.execute(
        "UPDATE access.token SET expires = now() - interval '1 second' WHERE token_id = %s", (late.token_id,)
    )
    with pytest.raises(AuthenticationError, match="expired"):
        identity.authenticate(late.token)
    good = identity.create_token("vera", ["read:tap"], 1)
    identity.authenticate(good.token)
    database.execute("UPDATE access.account SET disabled = true WHERE name = 'vera'")
    with pytest.raises(AuthenticationError):
        identity.authenticate(good.token)
    states = {row["token_id"]: row["valid"] for row in identity.tokens("vera")}
    assert states == {token.token_id: False, late.token_id: False, good.token_id: True}


def test_rights_follow_groups_at_once(identity):
    token = identity.create_token("vera", ["read:image"], 30).token
    assert identity.authenticate(token).rights == {"public"}
    identity.add_member("vera", "collaboration")
    assert identity.authenticate(token).rights == {"public", "collaboration"}
    identity.add_member("vera", "embargo")
    assert identity.authenticate(token).rights == {"public", "collaboration", "embargo"}
    identity.remove_member("vera", "embargo")
    identity.remove_member("vera", "collaboration")
    assert identity.authenticate(token).rights == {"public"}
    with pytest.raises(NotFoundError, match="collaboration, embargo"):
        identity.add_member("vera", "friends")


def test_the_scope_admin_alone_makes_no_administrator(identity):
    who = identity.authenticate(identity.create_token("vera", ["admin"], 1).token)
    assert not who.is_administrator
    with pytest.raises(AuthorizationError):
        who.require("write:table")


@pytest.mark.parametrize(
    ("user", "scopes", "days"),
    [("vera", ["read:everything"], 1), ("vera", [], 1), ("vera", ["read:tap"], 0), ("vera", ["read:tap"], 1e9),
     ("vera", ["read:tap"], float("nan")), ("", ["read:tap"], 1), ("a b", ["read:tap"], 1), ("anonymous", ["read:tap"], 1),
     ("../x", ["read:tap"], 1), ("x" * 65, ["read:tap"], 1)],
)  # fmt: skip
def test_bad_tokens_are_not_made(identity, database, user, scopes, days):
    with pytest.raises(UserError, match="expected"):
        identity.create_token(user, scopes, days)
    assert database.execute("SELECT count(*) FROM access.token") == [(0,)]


def test_the_administrators_token_is_for_its_owner_only_and_stays(identity, tmp_path):
    path = identity.local_administrator(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first = path.read_text()
    assert identity.authenticate(first).is_administrator
    assert identity.local_administrator(tmp_path).read_text() == first
    path.chmod(0o644)  # others may have read it
    identity.local_administrator(tmp_path)
    assert path.read_text() != first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_limit_holds_for_each_one_alone(identity):
    vera, fritz = Principal("vera", token_id="a"), Principal("fritz", token_id="b")
    used = [identity.count_request(vera, "requests", 3).used for _ in range(3)]
    if used != [1, 2, 3]:  # a minute began in between
        used = [identity.count_request(vera, "requests", 3).used for _ in range(3)]
    caught = None
    for _ in range(4):
        try:
            identity.count_request(vera, "requests", 3)
        except RateLimitError as error:
            caught = error
    headers = caught.allowance.headers()
    assert headers["X-RateLimit-Limit"] == "3"
    assert headers["X-RateLimit-Remaining"] == "0"
    assert 1 <= caught.allowance.retry_after_s() <= 61
    assert identity.count_request(fritz, "requests", 3).used == 1
    assert identity.count_request(vera, "other", 3).used == 1
    here, there = Principal(address="10.0.0.1"), Principal(address="10.0.0.2")
    identity.count_request(here, "requests", 1)
    assert identity.count_request(there, "requests", 1).used == 1


def test_the_command_line(identity, database, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from cumbre.cli.token import token
    from cumbre.core.configuration import Site
    from cumbre.site.profiles import create_site

    create_site(tmp_path / "site")
    Site.load(tmp_path / "site")
    (tmp_path / "site" / "run" / "postgres.dsn").write_text(database.dsn)
    site = ["--site", str(tmp_path / "site")]
    runner = CliRunner()
    made = runner.invoke(
        token, ["create", *site, "--user", "vera", "--scope", "read:tap", "--days", "2", "--json"]
    )
    assert made.exit_code == 0, made.output
    answer = json.loads(made.output)
    assert identity.authenticate(answer["token"]).account == "vera"
    listed = json.loads(runner.invoke(token, ["list", *site, "--json"]).output)
    assert [(row["token_id"], row["valid"]) for row in listed] == [(answer["token_id"], True)]
    groups = runner.invoke(token, ["group", *site, "--user", "vera", "--add", "embargo", "--json"])
    assert json.loads(groups.output) == {"user": "vera", "groups": ["embargo"]}
    assert runner.invoke(token, ["revoke", *site, answer["token_id"]]).exit_code == 0
    with pytest.raises(AuthenticationError, match="revoked"):
        identity.authenticate(answer["token"])
