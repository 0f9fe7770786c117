"""Logging in against a provider in a process of its own, and against the built-in one; what a thief could try."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import ECKey

from cumbre.access.http.login import SESSION, PageGuard
from cumbre.access.identity import AuthenticationError
from cumbre.access.identity_local import KEY_FILE, USERS_FILE, Users
from cumbre.access.identity_oidc import OidcProvider, challenge_of
from cumbre.core.errors import ConfigurationError, UserError
from cumbre.core.instrument import load_instrument
from support.archive_world import NEW

PASSWORD = "correct horse battery staple"
NEW_FILE = f"/files/raw/{NEW}/{load_instrument('democam').detector(0).name}"


@pytest.fixture(scope="module")
def users(world):
    """People of the site: the built-in provider's, and the same of a provider elsewhere."""
    found = Users(world.site.root / USERS_FILE)
    found.set("vera", PASSWORD, ["embargo"])
    found.set("ole", PASSWORD, [])
    return found


@pytest.fixture(scope="module")
def elsewhere(world, users, tmp_path_factory):
    """A provider as a process of its own: its issuer and its folder."""
    folder = tmp_path_factory.mktemp("provider")
    there = Users(folder / USERS_FILE)
    there.set("vera", PASSWORD, ["observers", "administrators"])
    there.set("nina", PASSWORD, ["observers", "unknown"])
    process = subprocess.Popen(
        [sys.executable, "-m", "cumbre.access.identity_local", str(folder), f"{world.url}/login/callback"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process.stdout.readline().strip(), folder
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


@pytest.fixture
def external(world, elsewhere, monkeypatch):
    """The site uses the provider elsewhere."""
    config = world.site.config.access
    monkeypatch.setattr(config, "issuer", elsewhere[0])
    config.groups.update(observers="embargo")
    object.__setattr__(world.access.login, "is_local", False)
    yield elsewhere
    config.groups.clear()
    object.__setattr__(world.access.login, "is_local", True)


def go(client: httpx.Client, answer: httpx.Response) -> httpx.Response:
    """Follow one redirect."""
    assert answer.status_code == 303, answer.text
    return client.get(answer.headers["location"])


def log_in(client: httpx.Client, name: str, password: str = PASSWORD, target: str = "/login/account"):
    """The steps of a browser; returns the answer of our callback."""
    asked = client.get("/login", params={"next": target})
    form = go(client, asked)
    assert form.status_code == 200, form.text
    sent = client.post(asked.headers["location"], data={"name": name, "password": password})
    return go(client, sent) if sent.status_code == 303 else sent


def word_of(page: httpx.Response) -> str:
    return re.search(r'name="word" value="([0-9a-f]{64})"', page.text)[1]


@pytest.mark.parametrize("where", ["built-in", "elsewhere"])
def test_a_login_gives_a_session_for_pages_and_tokens_for_data(world, client, users, request, where):
    if where == "elsewhere":
        request.getfixturevalue("external")
    name = "vera" if where == "built-in" else "nina"
    back = log_in(client, name)
    assert (back.status_code, back.headers["location"]) == (303, "/login/account")
    cookie = back.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    page = client.get("/login/account")
    assert name in page.text
    assert "embargo" in page.text
    # the cookie opens no data
    assert client.get(NEW_FILE).status_code == 404
    assert NEW not in client.get("/sia/query").text
    # a token does; it comes only to a form of our own page
    assert client.post("/login/token", data={"scope": "read:image", "word": "0" * 64}).status_code == 403
    made = client.post("/login/token", data={"scope": "read:image", "word": word_of(page), "days": "2"})
    token = re.search(r"cmb_[0-9a-f]{12}_[\w-]{43}", made.text)[0]
    assert client.get(NEW_FILE, headers=world.headers(token)).status_code == 200
    refused = client.post("/login/token", data={"scope": "admin", "word": word_of(page)})
    assert refused.status_code == 400
    assert client.post("/login/logout", data={"word": word_of(page)}).status_code == 200
    assert client.get("/login/account").headers["location"].startswith("/login?next=")


def test_groups_follow_the_provider_and_administrators_are_made_here_only(world, client, external):
    identity = world.access.service.identity
    log_in(client, "vera")
    # "vera" is the built-in provider's: the one from elsewhere is somebody else
    page = client.get("/login/account").text
    account = re.search(r"<h1>(vera\.[0-9a-f]{8})</h1>", page)[1]
    assert identity.groups_of(account) == {"embargo"}
    identity.add_member(account, "collaboration")
    Users(external[1] / USERS_FILE).set("vera", PASSWORD, [])
    log_in(client, "vera")
    assert identity.groups_of(account) == {"collaboration"}  # what is given here stays
    world.site.config.access.groups["admins"] = "administrators"
    Users(external[1] / USERS_FILE).set("vera", PASSWORD, ["admins"])
    log_in(client, "vera")
    assert identity.groups_of(account) == {"collaboration", "administrators"}
    assert "admin" not in world.access.login.logins.who(client.cookies[SESSION]).scopes


def test_wrong_passwords_and_strange_requests_get_nowhere(world, client, users):
    assert log_in(client, "ole", "wrong password!").status_code == 403
    assert log_in(client, "nobody", PASSWORD).status_code == 403
    for _ in range(5):
        last = log_in(client, "mallory", "guess number one")
    assert last.status_code == 429 or log_in(client, "mallory", PASSWORD).status_code == 429
    begun = client.get("/login").headers["location"]
    address, asked = begun.partition("?")[0], {k: v[0] for k, v in parse_qs(urlsplit(begun).query).items()}
    for wrong in (
        {"redirect_uri": "http://evil.example/login/callback"}, {"client_id": "other"}, {"response_type": "token"},
        {"code_challenge_method": "plain"}, {"code_challenge": "short"}, {"scope": "profile"},
    ):  # fmt: skip
        answer = client.get(address, params=asked | wrong)
        assert answer.status_code == 400, wrong
        assert "location" not in answer.headers
    with pytest.raises(UserError):
        users.set("x", "too short", [])
    stored = world.site.root / USERS_FILE
    assert stored.stat().st_mode & 0o077 == 0
    assert PASSWORD not in stored.read_text()


def test_an_answer_counts_once_in_the_browser_that_asked(world, client, users):
    asked = client.get("/login")
    sent = client.post(asked.headers["location"], data={"name": "ole", "password": PASSWORD})
    back = sent.headers["location"]
    with httpx.Client(base_url=world.url) as other:
        assert other.get(back).status_code == 401  # another browser
    assert client.get(back).status_code == 303
    with httpx.Client(base_url=world.url) as thief:
        thief.cookies.set("cumbre_login", parse_qs(urlsplit(back).query)["state"][0])
        assert thief.get(back).status_code == 401  # a second time, even with the cookie
    # a code is worth nothing without the secret that began the login, and nothing twice
    asked = client.get("/login").headers["location"]
    code = parse_qs(
        urlsplit(client.post(asked, data={"name": "ole", "password": PASSWORD}).headers["location"]).query
    )["code"][0]
    form = {"grant_type": "authorization_code", "code": code, "client_id": "cumbre",
            "redirect_uri": f"{world.url}/login/callback", "code_verifier": "x" * 43}  # fmt: skip
    assert client.post("/idp/token", data=form).json() == {"error": "invalid_grant"}
    for target in ("https://evil.example/", "//evil.example", "/\\evil.example", "javascript:alert(1)"):
        back = log_in(client, "ole", target=target)
        assert back.headers["location"] == "/login/account"


def test_only_genuine_identity_tokens_are_believed(elsewhere):
    issuer, folder = elsewhere
    provider = OidcProvider(issuer, "cumbre")
    httpx.get(f"{issuer}/jwks")  # the key is made when it is first asked for
    key = ECKey.import_key(json.loads((folder / KEY_FILE).read_bytes()))
    now = int(time.time())
    claims = {"iss": issuer, "sub": "s", "aud": "cumbre", "iat": now, "exp": now + 60, "nonce": "n"}

    def token(header=None, signed_by=key, **changed):
        return jwt.encode({"alg": "ES256", "kid": key.kid} | (header or {}), claims | changed, signed_by)

    assert provider._claims(token(groups=["a", 7], preferred_username="v"), "n").groups == ("a",)
    stranger = ECKey.generate_key("P-256")
    unsigned = token().rpartition(".")[0] + "."
    for bad in (
        token(signed_by=stranger), token(aud="other"), token(iss="https://evil.example"), token(exp=now - 3600),
        token(nonce="other"), token(aud=["cumbre", "other"]), token(azp="other"), unsigned, "not.a.token", "",
    ):  # fmt: skip
        with pytest.raises(AuthenticationError):
            provider._claims(bad, "n")
    for address in ("http://provider.example", "ftp://x", ""):
        with pytest.raises(ConfigurationError):
            OidcProvider(address, "cumbre")
    assert (
        challenge_of("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")
        == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
    )


def test_a_program_gets_a_token_when_a_person_allows_it(world, client, users):
    asked = client.post("/login/device", data={"scope": "read:image read:tap", "days": "3"}).json()
    with httpx.Client(base_url=world.url) as program:
        pending = program.post("/login/device/token", data={"device_code": asked["device_code"]})
        assert (pending.status_code, pending.json()) == (400, {"error": "authorization_pending"})
        confirm = f"/login/confirm?user_code={asked['user_code']}"
        assert client.get(confirm).headers["location"].startswith("/login?next=")
        back = log_in(client, "vera", target=confirm)
        page = go(client, back)
        assert "read:image" in page.text
        wrong = client.post("/login/confirm", data={"user_code": asked["user_code"], "word": "0" * 64})
        assert wrong.status_code == 403
        client.post("/login/confirm", data={"user_code": asked["user_code"], "word": word_of(page)})
        given = program.post("/login/device/token", data={"device_code": asked["device_code"]}).json()
        assert given["user"] == "vera"
        assert program.get(NEW_FILE, headers=world.headers(given["access_token"])).status_code == 200
        again = program.post("/login/device/token", data={"device_code": asked["device_code"]})
        assert again.status_code == 401
        assert program.post("/login/device", data={"scope": "admin"}).status_code == 400


def test_cumbre_login_prints_a_token(world, client, users):
    command = subprocess.Popen(
        [sys.executable, "-m", "cumbre.cli.main", "login", "--url", world.url],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    told = command.stderr.readline()
    address = re.search(r"http\S+user_code=\S+", told)[0]
    log_in(client, "vera", target=address.removeprefix(world.url))
    page = client.get(address)
    client.post("/login/confirm", data={"user_code": address.rpartition("=")[2], "word": word_of(page)})
    out, said = command.communicate(timeout=60)
    assert command.returncode == 0, said
    assert client.get(NEW_FILE, headers=world.headers(out.strip())).status_code == 200


def test_pages_about_embargoed_images_are_guarded_on_a_network(world, users):
    """With pages for those who log in: the application is wrapped as it is on an address that others reach."""
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    pages = [
        Route(path, lambda request: PlainTextResponse("secret"))
        for path in ("/", "/exposures/x", "/tap/sync")
    ]
    config = world.site.config
    inner = Starlette(routes=pages)
    paths = [route.path for route in world.access.routes()]
    assert world.access.guard(inner, paths) is inner  # on loopback
    host, config.web.host = config.web.host, "0.0.0.0"
    try:
        guarded = world.access.guard(inner, paths)
    finally:
        config.web.host = host
    assert isinstance(guarded, PageGuard)
    admin = world.headers(world.admin)
    member = world.headers(world.token("member2", "collaboration"))
    session = world.access.login.logins.open_session("vera")
    world.access.service.identity.set_claimed_groups("vera", ["embargo"])

    async def look() -> None:
        transport = httpx.ASGITransport(guarded)
        async with httpx.AsyncClient(transport=transport, base_url="http://site") as browser:
            for path in ("/", "/exposures/x"):
                assert (await browser.get(path)).status_code == 401
                html = await browser.get(path, headers={"Accept": "text/html"})
                assert html.headers["location"] == f"/login?{urlencode({'next': path})}"
                assert (await browser.get(path, headers=member)).status_code == 403
                assert (await browser.get(path, headers=admin)).text == "secret"
                assert (await browser.get(path, headers={"Cookie": f"{SESSION}={session}"})).text == "secret"
                assert (
                    await browser.get(path, headers={"Cookie": f"{SESSION}=x{session}"})
                ).status_code == 401
            assert (await browser.get("/tap/sync")).text == "secret"  # decides itself

    asyncio.run(look())
