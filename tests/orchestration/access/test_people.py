"""People log in at a real identity provider through the real oauth2-proxy, and their groups decide what they may do."""

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from docs import screenshot
from orchestration.access.credentials import Credentials, Identity
from orchestration.access.people import People, is_cross_origin, read_groups
from orchestration.access.routes import Role
from orchestration.errors import SettingsError
from orchestration.operations.local_cluster import binaries
from tests.benchmarks import access
from tests.orchestration.access.guarded_server import CREDENTIALS, OIDC_GROUPS, OIDC_KEY, GuardedServer
from tests.orchestration.access.single_sign_on import FORGED, HOST, SingleSignOn, single_sign_on
from tests.parts import client_of, wait_until


@pytest.fixture(scope="module")
def sign_on(guarded: GuardedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SingleSignOn]:
    with single_sign_on(tmp_path_factory.mktemp("sign-on"), guarded.url) as found:
        yield found


@pytest.fixture(scope="module")
def operator(sign_on: SingleSignOn) -> Iterator[httpx.Client]:
    with sign_on.session("olga") as browser:
        yield browser


@pytest.fixture(scope="module")
def viewer(sign_on: SingleSignOn) -> Iterator[httpx.Client]:
    with sign_on.session("vera") as browser:
        yield browser


def _create(client: httpx.Client, **headers: str) -> int:
    """Return the status of the answer to a write."""
    return client.post("/flows/", json={"name": f"made-{uuid4()}"}, headers=headers).status_code


def _basic(credential: str) -> str:
    return "Basic " + base64.b64encode(credential.encode()).decode()


def test_operators_group_may_write_and_viewers_group_may_read(operator: httpx.Client, viewer: httpx.Client) -> None:
    assert _create(operator) == 201
    assert operator.post("/variables/filter", json={}).status_code == 200
    assert _create(viewer) == 403
    assert viewer.post("/flows/filter", json={}).status_code == 200
    assert viewer.post("/variables/filter", json={}).status_code == 403


def test_person_in_groups_of_both_roles_is_an_operator(sign_on: SingleSignOn) -> None:
    with sign_on.session("otto") as browser:
        assert _create(browser) == 201


@pytest.mark.parametrize("name", ["nora", "noel", "carl"])
def test_person_without_a_mapped_group_gets_no_session(sign_on: SingleSignOn, name: str) -> None:
    with sign_on.browser() as browser:
        answer = sign_on.log_in(browser, name)
        assert (answer.url.host, answer.status_code) == (HOST, 403)
        assert browser.get("/api/admin/version").status_code == 401


def test_audit_log_names_the_person(guarded: GuardedServer, operator: httpx.Client, viewer: httpx.Client) -> None:
    key = f"audited-{uuid4()}"
    for client in (operator, viewer):
        client.post(f"/concurrency_limits/tag/{key}/reset", json={})

    def lines() -> set[tuple[str, str, int]]:
        found = [line for line in guarded.audit() if key in line["path"]]
        return {(line["user"], line["role"], line["status"]) for line in found}

    wait_until(lambda: len(lines()) == 2, "two audit lines")
    assert lines() == {("olga@example.com", "operator", 404), ("vera@example.com", "viewer", 403)}
    assert OIDC_KEY not in guarded.log.read_text()


def test_without_a_session_pages_redirect_to_the_login_and_the_api_refuses(sign_on: SingleSignOn) -> None:
    with sign_on.browser() as browser:
        page = browser.get("/runs", headers={"Accept": "text/html"})
        assert page.status_code == 302
        assert page.headers["Location"].startswith(f"{sign_on.issuer}auth?")
        for path in ("/api/flows/filter", "/ui-settings"):
            assert browser.get(path, headers={"Accept": "*/*"}).status_code == 401
        assert browser.get("/api/health").json() is True, "probes of load balancers have no session"


def test_passwords_do_not_pass_oauth2_proxy(sign_on: SingleSignOn, viewer: httpx.Client) -> None:
    """Machines use another host of the Ingress, or the Service."""
    with sign_on.browser() as browser:
        headers = {"Authorization": _basic(CREDENTIALS["operator"])}
        assert browser.post("/api/flows/filter", json={}, headers=headers).status_code == 401
    assert _create(viewer, **headers) == 403, "a session wins over a password"


@pytest.mark.further
def test_expired_session_redirects_to_the_login(guarded: GuardedServer, tmp_path: Path) -> None:
    expire = ["--cookie-expire=3s"]
    with single_sign_on(tmp_path, guarded.url, expire) as sign_on, sign_on.browser() as browser:
        sign_on.log_in(browser, "vera")
        browser.base_url = f"https://{HOST}/api"
        kept = dict(browser.cookies)
        time.sleep(3.5)
        cookies = "; ".join(f"{name}={value}" for name, value in kept.items())
        assert browser.get("/admin/version", headers={"Cookie": cookies}).status_code == 401
        page = browser.get(f"https://{HOST}/", headers={"Cookie": cookies, "Accept": "text/html"})
        assert page.headers["Location"].startswith(f"{sign_on.issuer}auth?")


def test_sign_out_ends_the_session(sign_on: SingleSignOn) -> None:
    with sign_on.session("vera") as browser:
        assert browser.get(f"https://{HOST}/oauth2/sign_out").status_code == 302
        assert browser.get("/admin/version").status_code == 401


def test_cookie_of_the_session_is_for_this_host_over_https(sign_on: SingleSignOn) -> None:
    with sign_on.browser() as browser:
        sign_on.log_in(browser, "vera")
        [cookie] = [cookie for cookie in browser.cookies.jar if cookie.name == "__Host-prefect"]
        assert (cookie.secure, cookie.path, cookie.domain_specified) == (True, "/", False)
        assert cookie.has_nonstandard_attr("HttpOnly")
        assert cookie.get_nonstandard_attr("SameSite") == "Lax"


def test_headers_of_a_browser_do_not_change_the_role(viewer: httpx.Client, guarded: GuardedServer) -> None:
    assert _create(viewer, **FORGED) == 403
    assert _create(viewer, **FORGED | {"Authorization": _basic(f"olga@example.com:{'x' * 48}")}) == 403
    assert {line["user"] for line in guarded.audit() if line["path"] == "/flows/" and line["role"] == "viewer"} <= {
        "vera@example.com", "viewer",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("credential", "status"),
    [
        (None, 401),
        (CREDENTIALS["viewer"], 403),
        (f"olga@example.com:{'x' * 48}", 401),
        (f":{OIDC_KEY}", 401),
        (OIDC_KEY, 401),
    ],
)
def test_groups_without_the_key_of_oauth2_proxy_have_no_effect(
    guarded: GuardedServer, credential: str | None, status: int
) -> None:
    with guarded.client(credential) if credential else client_of(guarded.url) as client:
        assert _create(client, **FORGED) == status


@pytest.mark.parametrize("groups", [None, "", "staff", "data-platform-2, Data"])
def test_server_refuses_a_person_in_no_group_with_a_role(guarded: GuardedServer, groups: str | None) -> None:
    """oauth2-proxy has logged the person in: its own list of groups may be longer, by an argument of the user."""
    with guarded.client(f"nora@example.com:{OIDC_KEY}") as client:
        answer = client.get("/admin/version", headers={} if groups is None else {"X-Forwarded-Groups": groups})
        assert answer.status_code == 403
        assert answer.json()["detail"] == (
            "nora@example.com is in no group with access to Prefect. Ask an operator for access"
        )
    wait_until(
        lambda: ("nora@example.com", None) in {(line["user"], line["role"]) for line in guarded.audit()},
        "an audit line",
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": f"https://{HOST}"}, 201),
        ({"Origin": f"https://{HOST}", "Sec-Fetch-Site": "same-origin"}, 201),
        ({"Origin": "https://evil.example.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://evil.example.com", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_pages_of_other_origins_cannot_use_a_session(
    operator: httpx.Client, headers: dict[str, str], status: int
) -> None:
    assert _create(operator, **headers) == status
    assert operator.post("/flows/filter", json={}, headers=headers).status_code == {201: 200}.get(status, status)


def test_other_origins_may_call_with_a_password(guarded: GuardedServer) -> None:
    """A page that knows a password needs no cookie."""
    with guarded.client(CREDENTIALS["operator"]) as client:
        assert _create(client, Origin="https://other.example.com") == 201


def _authenticate(socket: ClientConnection) -> str | int:
    """Send the first message of a browser; return the type of the answer, or the code with which the server closes."""
    with socket:
        socket.send(json.dumps({"type": "auth", "token": None}))
        try:
            return str(json.loads(socket.recv(75))["type"])
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else 0


def test_session_opens_the_websockets_that_its_role_may(
    sign_on: SingleSignOn, operator: httpx.Client, viewer: httpx.Client
) -> None:
    assert _authenticate(sign_on.websocket(operator, "/api/events/out")) == "auth_success"
    assert _authenticate(sign_on.websocket(viewer, "/api/logs/out")) == "auth_success"
    assert _authenticate(sign_on.websocket(operator, "/api/events/in")) == "auth_success"
    assert _authenticate(sign_on.websocket(viewer, "/api/events/in")) == 1008
    foreign = sign_on.websocket(operator, "/api/events/out", Origin="https://evil.example.com")
    assert _authenticate(foreign) == 1008


def test_ui_asks_for_no_password_behind_oauth2_proxy(guarded: GuardedServer, viewer: httpx.Client) -> None:
    """The UI shows its own form for a password if the setting `auth` is BASIC."""
    direct = httpx.get(guarded.url.replace("/api", "/ui-settings"), headers=FORGED, trust_env=False).json()
    assert direct["auth"] == "BASIC"
    through = viewer.get(f"https://{HOST}/ui-settings")
    assert through.json() == direct | {"auth": None}


@pytest.mark.further
def test_real_browser_shows_both_uis_after_the_login(guarded: GuardedServer, tmp_path: Path) -> None:
    binaries.install_packages({"chromium": "chromium"}, "30 s")
    extra = ["--cookie-secure=false", "--cookie-name=prefect"]
    with single_sign_on(tmp_path, guarded.url, extra) as sign_on, screenshot.browser() as send:

        def evaluate(expression: str) -> Any:
            return send("Runtime.evaluate", expression=expression)["result"].get("value")

        def shows(text: str) -> bool:
            return text in str(evaluate("document.body ? document.body.innerText : ''"))

        fields = {"username": "olga", "password": "password-of-olga"}
        send("Page.navigate", url=f"http://127.0.0.1:{sign_on.proxy.number}/")
        wait_until(lambda: shows("Password"), "the form of the identity provider")
        for name, value in fields.items():
            evaluate(f"document.getElementById({name!r}).value = {value!r}")
        evaluate("document.forms[0].submit()")
        wait_until(lambda: shows("Switch to V1 UI"), "the V2 UI")
        send("Page.navigate", url=f"http://127.0.0.1:{sign_on.proxy.number}/runs")
        wait_until(lambda: shows("Switch to V2 UI"), "the V1 UI")
        assert evaluate("localStorage.getItem('prefect-password')") is None
        assert sign_on.log.read_text().count("Initiating login") == 1, "the browser is redirected once"


@pytest.mark.further
def test_benchmark_measures_requests_of_a_logged_in_person(guarded: GuardedServer, sign_on: SingleSignOn) -> None:
    figures = access.measure_login(guarded, sign_on, pairs=2)
    assert [len(figure.values) for figure in figures] == [2, 2, 2] * len(access.REQUESTS)
    logged_in, direct, added = figures[:3]
    assert added.name == "read a flow run, logged in: difference of a pair"
    assert added.values == [first - second for first, second in zip(logged_in.values, direct.values, strict=True)]


def test_without_groups_the_key_of_oauth2_proxy_is_no_credential(tmp_path: Path) -> None:
    (tmp_path / "oidc-key").write_text(OIDC_KEY)
    known = Credentials(tmp_path, "admin:secret")
    headers = [(b"authorization", _basic(f"olga@example.com:{OIDC_KEY}").encode()), (b"x-forwarded-groups", b"data")]
    assert People(known, {}).identify({"headers": headers}) is None
    groups = read_groups(json.dumps(OIDC_GROUPS))
    assert People(known, groups).identify({"headers": headers}) == Identity(
        "olga@example.com", Role.VIEWER, is_person=True
    )
    assert known.identify(f"olga@example.com:{OIDC_KEY}") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a JSON object with a list of groups"),
        ("[]", "is not a JSON object with a list of groups"),
        ('{"worker": ["a"]}', "is not a JSON object with a list of groups"),
        ('{"viewer": "a"}', "is not a JSON object with a list of groups"),
        ('{"viewer": [1]}', "is not a JSON object with a list of groups"),
        ('{"viewer": [], "operator": []}', "names no group"),
        ('{"operator": ["a,b"]}', "oauth2-proxy separates groups by commas"),
    ],
)
def test_invalid_groups_stop_the_server(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_groups(text)


def test_request_of_no_browser_has_no_origin() -> None:
    assert not is_cross_origin({"headers": [(b"host", b"prefect.example.com")]})
