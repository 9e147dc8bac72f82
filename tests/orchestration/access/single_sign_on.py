"""A real identity provider, and the real oauth2-proxy with the arguments of the chart, in front of a Prefect server."""

import contextlib
import json
import os
import re
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from orchestration.operations.local_cluster import binaries
from tests import parts
from tests.helm.rendering import Object, environment, pod_specs, render
from tests.orchestration.access.guarded_server import OIDC_GROUPS, OIDC_KEY

HOST = "prefect.example.com"
MOUNT = "/etc/prefect-tls"
SECRETS = {
    "OAUTH2_PROXY_CLIENT_SECRET": "secret-of-the-client",
    "OAUTH2_PROXY_COOKIE_SECRET": "c" * 32,
    "OAUTH2_PROXY_BASIC_AUTH_PASSWORD": OIDC_KEY,
}
GROUPS = {
    "olga": ["staff", "data admins"],
    "vera": ["data"],
    "otto": ["data", "data-platform"],
    "nora": ["staff"],
    "noel": [],
    "carl": ["staff,data-platform"],
}
"""The groups of the people, by their names."""

FORGED = {
    "X-Forwarded-User": "olga@example.com",
    "X-Forwarded-Email": "olga@example.com",
    "X-Forwarded-Groups": "data-platform",
    "X_Forwarded_Groups": "data-platform",
    "X-Forwarded-Preferred-Username": "olga",
}
"""Headers of a request that claims to be an operator's."""


@dataclass(frozen=True)
class Port:
    """A port of the loopback interface that leads to a server.

    Args:
        number: the port.
        name: the server's name in its certificate. Empty: the server has no TLS.
        ca: the file with the certificate of the server's CA.
    """

    number: int
    name: str = ""
    ca: Path | None = None

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The settings of a client that verifies the server; None without TLS."""
        return ssl.create_default_context(cafile=self.ca) if self.name else None


class _Ingress(httpx.HTTPTransport):
    """Ends the TLS of a host as an ingress controller does, and sends the requests to a port."""

    def __init__(self, port: Port) -> None:
        super().__init__(verify=port.tls or True)
        self._port = port

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        scheme = "https" if self._port.name else "http"
        url = request.url.copy_with(scheme=scheme, host="127.0.0.1", port=self._port.number)
        extensions = request.extensions | {"sni_hostname": self._port.name}
        return super().handle_request(
            httpx.Request(request.method, url, headers=request.headers, stream=request.stream, extensions=extensions)
        )


@dataclass
class SingleSignOn:
    """oauth2-proxy and its identity provider, as a browser reaches them.

    Args:
        proxy: the port of oauth2-proxy.
        issuer: the URL of the identity provider.
        log: the file with the output of both.
        provider: the port of the identity provider, if its URL does not lead to it from this machine.
    """

    proxy: Port
    issuer: str
    log: Path = Path(os.devnull)
    provider: Port | None = None

    def browser(self) -> httpx.Client:
        """Return a client without a session."""
        mounts = {f"https://{HOST}": _Ingress(self.proxy)}
        if self.provider:
            mounts[f"https://{httpx.URL(self.issuer).host}"] = _Ingress(self.provider)
        return httpx.Client(base_url=f"https://{HOST}", mounts=mounts, timeout=75, trust_env=False)

    @contextlib.contextmanager
    def session(self, name: str) -> Iterator[httpx.Client]:
        """Yield a client of the API in which a person has logged in."""
        with self.browser() as browser:
            answer = self.log_in(browser, name)
            assert answer.status_code == 200, self.log.read_text() or answer.text
            browser.base_url = f"https://{HOST}/api"
            yield browser

    def log_in(self, browser: httpx.Client, name: str) -> httpx.Response:
        """Log a person in at the identity provider; return the answer of the page that the browser then shows."""
        form = browser.get("/", headers={"Accept": "text/html"}, follow_redirects=True)
        assert str(form.url).startswith(self.issuer), form.url
        [request] = re.findall(r'name="id" value="(.*?)"', form.text)
        fields = {"id": request, "username": name, "password": f"password-of-{name}"}
        return browser.post(form.url.join("/login/username"), data=fields, follow_redirects=True)

    def websocket(self, browser: httpx.Client, path: str, **headers: str) -> ClientConnection:
        """Open a websocket with the cookies of a browser."""
        return connect(
            f"{'wss' if self.proxy.name else 'ws'}://{HOST}{path}",
            sock=socket.create_connection(("127.0.0.1", self.proxy.number)),
            ssl=self.proxy.tls,
            server_hostname=self.proxy.name or None,
            subprotocols=[Subprotocol("prefect")],
            additional_headers={"Cookie": read_cookies(browser), "Origin": f"https://{HOST}"} | headers,
            open_timeout=75,
            proxy=None,
        )


def read_cookies(browser: httpx.Client) -> str:
    """Return the header `Cookie` of a browser's requests to oauth2-proxy."""
    names = ((cookie.name, cookie.value) for cookie in browser.cookies.jar if cookie.domain == HOST)
    return "; ".join(f"{name}={value}" for name, value in names)


def list_people() -> str:
    """Return the people of the identity provider, as its file."""
    return json.dumps({
        name: {"email": f"{name}@example.com", "password": f"password-of-{name}", "groups": groups}
        for name, groups in GROUPS.items()
    })  # fmt: skip


def find_issuer() -> Path:
    """Return the program of the identity provider."""
    return binaries.program_of(Path(__file__).with_name("issuer"), "issuer", "20 s, once")


@contextlib.contextmanager
def single_sign_on(
    folder: Path, server: str, extra: Sequence[str] = (), certificates: Path | None = None
) -> Iterator[SingleSignOn]:
    """Run an identity provider, and oauth2-proxy in front of a Prefect server.

    Args:
        folder: receives files.
        server: the URL of the server's API.
        extra: values of `oidc.extraArgs`. With `--cookie-secure=false`, a real browser logs in without TLS.
        certificates: a folder with `tls.crt`, `tls.key` and `ca.crt`, as for `tls.enabled`.
    """
    (folder / "people.json").write_text(list_people())
    log = folder / "log"
    address = f"127.0.0.1:{parts.free_port()}"
    issuer = f"http://{address}/"
    port = parts.free_port()
    given = [issuer, address, str(folder / "people.json"), "prefect", SECRETS["OAUTH2_PROXY_CLIENT_SECRET"]]
    url = f"http://127.0.0.1:{port}" if "--cookie-secure=false" in extra else f"https://{HOST}"
    command = [str(find_issuer()), *given, f"{url}/oauth2/callback"]
    container = _container(extra, bool(certificates))
    changed = {
        "--oidc-issuer-url": issuer,
        "--https-address" if certificates else "--http-address": f"127.0.0.1:{port}",
        "--upstream": str(httpx.URL(server).copy_with(path="/")),
    }
    variables = dict(SECRETS)
    if certificates:
        changed |= {
            f"--tls-{part}-file": str(certificates / f"tls.{end}") for part, end in (("cert", "crt"), ("key", "key"))
        }
        variables["SSL_CERT_DIR"] = environment(container)["SSL_CERT_DIR"].replace(MOUNT, str(certificates))
    assert set(environment(container)) == set(variables)
    assert changed.keys() <= {argument.partition("=")[0] for argument in container["args"]}
    proxy = [str(binaries.program("oauth2-proxy"))]
    for argument in container["args"]:
        name = argument.partition("=")[0]
        proxy.append(f"{name}={changed[name]}" if name in changed else argument)
    with (
        parts.serving(command, httpx.URL(issuer).port or 0, {}, log),
        parts.serving(proxy, port, variables, log),
    ):
        yield SingleSignOn(Port(port), issuer, log)


def _container(extra: Sequence[str], has_tls: bool) -> Object:
    """Return the container of oauth2-proxy, as the chart renders it."""
    oidc = {
        "enabled": True,
        "issuerUrl": "https://id.example.com",
        "clientId": "prefect",
        "existingSecret": "oidc",
        "groups": OIDC_GROUPS,
        "extraArgs": list(extra),
    }
    tls = {"enabled": has_tls, "existingSecret": "tls" if has_tls else ""}
    objects = render("prefect-server", {"image": {"tag": "1"}, "oidc": oidc, "tls": tls})
    [container] = pod_specs(objects)["Deployment/test-prefect-server-oidc"]["containers"]
    found: Object = container
    return found
