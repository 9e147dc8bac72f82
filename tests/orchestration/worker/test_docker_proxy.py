"""The Docker proxy forwards only the requests that the Docker worker needs.

The daemon is a fake server on a Unix socket that records every request.
"""

import asyncio
import contextlib
import copy
import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Scheduled

from orchestration.access.credentials import sign_run
from orchestration.errors import SettingsError
from orchestration.settings import ROOT
from orchestration.worker import job_template
from orchestration.worker.__main__ import docker_worker
from orchestration.worker.docker_policy import PROXY_LABEL, Policy, RefusedRequestError
from orchestration.worker.docker_proxy import Proxy
from tests.parts import examples, wait_until

IMAGE = "localhost:5000/prefect-orchestration:src-1"
OWN, FOREIGN, ABSENT = "a" * 64, "b" * 64, "c" * 64
V = "/v1.45"

TEMPLATE = job_template.read(ROOT / "docker/pool.yaml", "default")
POLICY = Policy.from_template(TEMPLATE, [IMAGE, "registry.example.com/data/*"], ["postgres", "server", "worker"])

BODY: dict[str, Any] = {
    "Image": IMAGE,
    "Cmd": ["prefect", "flow-run", "execute"],
    "Env": ["A=b"],
    "Labels": {"io.prefect.flow-run-id": "1", "team": "a"},
    "HostConfig": {
        "NetworkMode": "prefect",
        "Binds": ["prefect-run-secrets:/run/secrets:ro"],
        "Tmpfs": {"/tmp": ""},  # noqa: S108 - in the container
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges:true"],
        "ReadonlyRootfs": True,
        "AutoRemove": True,
        "Memory": 2**30,
    },
}


@dataclass
class Daemon:
    """Answers like a Docker daemon, and records every request."""

    requests: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    may_continue_log: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a container's log may continue after its first line."""
    closes_early: bool = False
    """Whether the daemon closes the connection after a log's first line."""
    closed_streams: int = 0

    def reset(self) -> None:
        """Forget all requests. The container OWN was created through the proxy, FOREIGN was not."""
        self.requests, self.bodies, self.headers = [], [], []
        self.labels = {OWN: {PROXY_LABEL: "true"}, FOREIGN: {"io.prefect.flow-run-id": "1"}}
        self.closes_early, self.closed_streams = False, 0
        self.may_continue_log.set()

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        target = request.raw_path
        self.requests.append((request.method, target))
        self.headers.append(dict(request.headers))
        path = re.sub(r"^/v[0-9.]+", "", target.partition("?")[0])
        container = path.split("/")[2] if path.startswith("/containers/") else ""
        if path == "/version":
            return web.json_response({"ApiVersion": "1.45", "Version": "27.0"})
        if path == "/containers/create":
            body = await request.json()
            self.bodies.append(body)
            container = uuid4().hex * 2
            self.labels[container] = body["Labels"]
            return web.json_response({"Id": container, "Warnings": []}, status=201)
        if path.startswith("/images/") and path.endswith("/json"):
            return web.json_response({"Id": "sha256:1", "RepoTags": [IMAGE]})
        if path == "/images/create":
            return web.Response(text='{"status": "Pulling"}\n{"status": "Done"}\n', content_type="application/json")
        if container not in self.labels:
            return web.json_response({"message": f"No such container: {container}"}, status=404)
        if path.endswith("/json"):
            shown = {"Id": container, "Name": "/run", "State": {"Status": "exited", "ExitCode": 3}}
            shown["Config"] = {"Labels": self.labels[container], "Tty": False, "Image": IMAGE}
            return web.json_response(shown)
        if path.endswith("/wait"):
            return web.json_response({"StatusCode": 3})
        if path.endswith("/logs"):
            return await self._log(request)
        return web.Response(status=204)

    async def _log(self, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/vnd.docker.multiplexed-stream"})
        await response.prepare(request)
        try:
            await response.write(b"\x01\0\0\0\0\0\0\x06first\n")
            await self.may_continue_log.wait()
            if self.closes_early:
                assert request.transport
                request.transport.close()
                return response
            await response.write(b"\x02\0\0\0\0\0\0\x07second\n")
            await response.write_eof()
        except asyncio.CancelledError:
            self.closed_streams += 1
            raise
        return response


@dataclass
class Parts:
    """A daemon and its proxy."""

    daemon: Daemon
    socket: Path
    loop: asyncio.AbstractEventLoop

    def send(self, data: bytes, method: str = "") -> tuple[int, str]:
        """Send bytes to the proxy; return the status and the message of the answer to the first request."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(180)
            connection.connect(str(self.socket))
            connection.sendall(data)
            with contextlib.closing(http.client.HTTPResponse(connection, method=method)) as response:
                response.begin()
                text = response.read()
        with contextlib.suppress(ValueError):
            return response.status, str(json.loads(text).get("message"))
        return response.status, text.decode()

    def ask(self, method: str, target: str, body: bytes = b"", *headers: str) -> tuple[int, str]:
        """Send one request."""
        lines = [f"{method} {target} HTTP/1.1", "Host: docker", "Content-Type: application/json", *headers]
        if not any(header.startswith("Transfer-Encoding") for header in headers):
            lines.append(f"Content-Length: {len(body)}")
        return self.send("\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body, method)

    def create(self, body: Any, name: str = "run-1") -> tuple[int, str]:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", f"{V}/containers/create?name={name}", text)

    def refuses(self, reason: str, answer: tuple[int, str]) -> None:
        """Check that the proxy refused a request, and that the daemon received nothing."""
        assert answer[0] == HTTPStatus.FORBIDDEN, answer
        assert answer[1].startswith("the Docker proxy refused this: ")
        assert reason in answer[1]
        assert self.daemon.requests == []


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    folder = tmp_path_factory.mktemp("docker")
    made: list[Parts] = []
    ready = threading.Event()
    stops: list[Callable[[], object]] = []

    async def serve() -> None:
        daemon, stop = Daemon(), asyncio.Event()
        runner = web.ServerRunner(web.Server(daemon.answer, handler_cancellation=True, access_log=None))
        await runner.setup()
        await web.UnixSite(runner, folder / "daemon.sock").start()
        serving = asyncio.create_task(Proxy(POLICY, folder / "daemon.sock").serve(folder / "proxy.sock", stop))
        while not (folder / "proxy.sock").exists():
            await asyncio.sleep(0.01)
        loop = asyncio.get_running_loop()
        stops.append(lambda: loop.call_soon_threadsafe(stop.set))
        made.append(Parts(daemon, folder / "proxy.sock", loop))
        ready.set()
        await serving
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(180)
    yield made[0]
    stops[0]()
    thread.join(180)


@pytest.fixture
def parts(running: Parts) -> Parts:
    running.daemon.reset()
    return running


def _changed(path: str, value: Any) -> dict[str, Any]:
    """Return the allowed body with one value changed, or one key added."""
    body = copy.deepcopy(BODY)
    *parents, name = path.split(".")
    changed = body
    for parent in parents:
        changed = changed[parent]
    changed[name] = value
    return body


def test_only_its_user_can_use_the_proxy_s_socket(parts: Parts) -> None:
    assert parts.socket.stat().st_mode & 0o777 == 0o600


def test_allowed_container_is_created_with_the_proxy_s_label(parts: Parts) -> None:
    assert parts.create(BODY)[0] == 201
    labels = BODY["Labels"] | {PROXY_LABEL: "true"}
    assert parts.daemon.bodies == [BODY | {"Labels": labels}]
    assert parts.daemon.requests == [("POST", f"{V}/containers/create?name=run-1")]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("HostConfig.Binds", ["/:/host"]),
        ("HostConfig.Binds", ["/var/run/docker.sock:/var/run/docker.sock"]),
        ("HostConfig.Binds", ["prefect-run-secrets:/run/secrets"]),
        ("HostConfig.Binds", ["prefect-server-secrets:/run/secrets:ro"]),
        ("HostConfig.Binds", ["prefect-docker-proxy:/run/docker-proxy"]),
        ("HostConfig.Binds", "/:/host"),
        ("HostConfig.Mounts", [{"Type": "bind", "Source": "/", "Target": "/host"}]),
        ("HostConfig.Mounts", []),
        ("HostConfig.Privileged", True),
        ("HostConfig.PidMode", "host"),
        ("HostConfig.PidMode", "container:postgres"),
        ("HostConfig.IpcMode", "host"),
        ("HostConfig.UTSMode", "host"),
        ("HostConfig.UsernsMode", "host"),
        ("HostConfig.CgroupnsMode", "host"),
        ("HostConfig.NetworkMode", "host"),
        ("HostConfig.NetworkMode", "bridge"),
        ("HostConfig.NetworkMode", "container:postgres"),
        ("HostConfig.NetworkMode", "default"),
        ("HostConfig.NetworkMode", ""),
        ("HostConfig.NetworkMode", None),
        ("HostConfig.CapAdd", ["SYS_ADMIN"]),
        ("HostConfig.CapDrop", []),
        ("HostConfig.CapDrop", ["NET_RAW"]),
        ("HostConfig.CapDrop", None),
        ("HostConfig.Devices", [{"PathOnHost": "/dev/sda"}]),
        ("HostConfig.DeviceRequests", [{"Count": -1}]),
        ("HostConfig.DeviceCgroupRules", ["a *:* rwm"]),
        ("HostConfig.SecurityOpt", ["seccomp=unconfined"]),
        ("HostConfig.SecurityOpt", ["no-new-privileges:true", "apparmor=unconfined"]),
        ("HostConfig.SecurityOpt", ["no-new-privileges:false"]),
        ("HostConfig.SecurityOpt", ["systempaths=unconfined"]),
        ("HostConfig.MaskedPaths", []),
        ("HostConfig.ReadonlyPaths", []),
        ("HostConfig.ReadonlyRootfs", False),
        ("HostConfig.ReadonlyRootfs", 1),
        ("HostConfig.CgroupParent", "/"),
        ("HostConfig.Cgroup", "container:postgres"),
        ("HostConfig.Runtime", "other"),
        ("HostConfig.VolumesFrom", ["postgres"]),
        ("HostConfig.VolumeDriver", "other"),
        ("HostConfig.PortBindings", {"80/tcp": [{"HostPort": "80"}]}),
        ("HostConfig.PublishAllPorts", True),
        ("HostConfig.Sysctls", {"kernel.core_pattern": "|/x"}),
        ("HostConfig.ExtraHosts", ["server:1.2.3.4"]),
        ("HostConfig.Links", ["postgres:db"]),
        ("HostConfig.GroupAdd", ["0"]),
        ("HostConfig.OomKillDisable", True),
        ("HostConfig.OomScoreAdj", -1000),
        ("HostConfig.RestartPolicy", {"Name": "always"}),
        ("HostConfig.StorageOpt", {"size": "1T"}),
        ("HostConfig.ContainerIDFile", "/etc/x"),
        ("HostConfig.BlkioWeightDevice", [{"Path": "/dev/sda", "Weight": 1}]),
        ("HostConfig.Tmpfs", {"/proc": ""}),
        ("HostConfig.Tmpfs", {"/tmp": "exec,suid,dev"}),  # noqa: S108 - in the container
        ("HostConfig.LogConfig", {"Type": "syslog", "Config": {"syslog-address": "tcp://1.2.3.4:514"}}),
        ("HostConfig.LogConfig", {"Type": "json-file", "Config": {"env": "A"}}),
        ("HostConfig.Memory", -1),
        ("HostConfig.Memory", 1.5),
        ("HostConfig.Memory", True),
        ("HostConfig", []),
        ("Image", "evil.example.com/x:1"),
        ("Image", f"{IMAGE}-other"),
        ("Image", "registry.example.com/database/x:1"),
        ("Image", "sha256:" + "0" * 64),
        ("Image", "registry.example.com/data/../x:1"),
        ("Image", "registry.example.com/data/x:1\n"),
        ("Image", ["x"]),
        ("User", "0"),
        ("Hostname", "server"),
        ("Domainname", "x"),
        ("MacAddress", "02:42:ac:11:00:02"),
        ("ExposedPorts", {"80/tcp": {}}),
        ("Healthcheck", {"Test": ["CMD", "x"]}),
        ("Runtime", "other"),
        ("Shell", ["x"]),
        ("Volumes", {"/etc": {}}),
        ("Volumes", {"/run/secrets": {"a": 1}}),
        ("Tty", True),
        ("OpenStdin", True),
        ("NetworkDisabled", True),
        ("NetworkingConfig", {"host": None}),
        ("NetworkingConfig", {"EndpointsConfig": {"bridge": {}}}),
        ("NetworkingConfig", {"EndpointsConfig": {"prefect": {"Aliases": ["postgres"]}}}),
        ("NetworkingConfig", {"prefect": {"Aliases": ["postgres"]}}),
        ("Env", {"A": "b"}),
        ("Labels", {}),
        ("Labels", {"io.prefect.flow-run-id": "1", "com.docker.compose.project": "prefect"}),
        ("Labels", {"io.prefect.flow-run-id": "1", PROXY_LABEL: "false"}),
        ("Labels", {"io.prefect.flow-run-id": 1}),
        ("Unknown", 1),
    ],
)
def test_container_with_a_forbidden_key_or_value_is_refused(parts: Parts, path: str, value: Any) -> None:
    parts.refuses("", parts.create(_changed(path, value)))


def test_refusal_names_the_key_and_the_cure(parts: Parts) -> None:
    parts.refuses(
        "HostConfig.Privileged: true is not allowed, only false", parts.create(_changed("HostConfig.Privileged", True))
    )
    parts.refuses(
        "the image 'evil.example.com/x:1' is not allowed. Allow it in RUN_IMAGES",
        parts.create(_changed("Image", "evil.example.com/x:1")),
    )
    parts.refuses("HostConfig.Mounts is not allowed", parts.create(_changed("HostConfig.Mounts", [])))


@pytest.mark.parametrize("key", ["CapDrop", "SecurityOpt", "ReadonlyRootfs", "NetworkMode"])
def test_container_without_a_required_restriction_is_refused(parts: Parts, key: str) -> None:
    body = copy.deepcopy(BODY)
    del body["HostConfig"][key]
    parts.refuses(f"HostConfig.{key} is missing", parts.create(body))
    parts.refuses("is missing", parts.create({key: BODY[key] for key in BODY if key != "HostConfig"}))


DANGEROUS = [
    "Binds", "Mounts", "Privileged", "PidMode", "IpcMode", "UTSMode", "UsernsMode", "NetworkMode", "CapAdd", "Devices",
    "SecurityOpt", "CgroupParent", "Runtime", "VolumesFrom", "PortBindings", "HostConfig", "Image", "NetworkingConfig",
]  # fmt: skip


@settings(max_examples=examples(0.4), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_key_that_go_reads_as_another_key_is_refused(parts: Parts, data: st.DataObject) -> None:
    """Go's JSON parser ignores case, and reads the long s and the Kelvin sign as s and k."""
    key = data.draw(st.sampled_from(DANGEROUS))
    folds = {"s": "sS\u017f", "k": "kK\u212a"}
    spelling = "".join(data.draw(st.sampled_from(folds.get(c.lower(), c.lower() + c.upper()))) for c in key)
    if spelling == key:
        return
    in_host = data.draw(st.booleans())
    parts.refuses(
        "is not allowed", parts.create(_changed(f"HostConfig.{spelling}" if in_host else spelling, {"x": True}))
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
    | st.sampled_from(["host", "ALL", "/:/host", "no-new-privileges:true", "prefect", IMAGE, "unconfined"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
SAFE_HOST = {"NetworkMode", "Binds", "Tmpfs", "CapDrop", "SecurityOpt", "ReadonlyRootfs", "Privileged", "AutoRemove"}
LIMITS = {"Memory", "MemorySwap", "MemoryReservation", "ShmSize", "PidsLimit"}
LIMITS |= {"NanoCpus", "CpuShares", "CpuQuota", "CpuPeriod"}
SAFE = {"Image", "Cmd", "Entrypoint", "Env", "Labels", "HostConfig"}
SAFE |= {"AttachStdin", "AttachStdout", "AttachStderr", "Tty", "OpenStdin", "StdinOnce", "NetworkDisabled"}


@settings(max_examples=examples(0.8), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from([*sorted(SAFE), *DANGEROUS]) | st.text(max_size=12), VALUES, max_size=4),
    st.dictionaries(
        st.sampled_from([*sorted(SAFE_HOST | LIMITS), *DANGEROUS, "LogConfig"]) | st.text(max_size=12),
        VALUES,
        max_size=4,
    ),
)
def test_generated_container_is_restricted_or_refused(parts: Parts, top: dict[str, Any], host: dict[str, Any]) -> None:
    parts.daemon.reset()
    body = copy.deepcopy(BODY) | {key: value for key, value in top.items() if key != "HostConfig"}
    body["HostConfig"] = BODY["HostConfig"] | host
    status, message = parts.create(body)
    if status == HTTPStatus.FORBIDDEN:
        return parts.refuses("", (status, message))
    [made] = parts.daemon.bodies
    given_host = made["HostConfig"]
    assert set(made) <= SAFE
    assert set(given_host) <= SAFE_HOST | LIMITS | {"LogConfig"}
    assert given_host["NetworkMode"] == "prefect"
    assert given_host["CapDrop"] == ["ALL"]
    assert given_host["SecurityOpt"][0].startswith("no-new-privileges")
    assert len(given_host["SecurityOpt"]) == 1
    assert given_host["ReadonlyRootfs"] is True
    assert given_host.get("Privileged", False) is False
    assert set(given_host.get("Binds", [])) <= {"prefect-run-secrets:/run/secrets:ro"}
    assert made["Image"] == IMAGE or made["Image"].startswith("registry.example.com/data/")
    assert made["Labels"][PROXY_LABEL] == "true"
    return None


TEXT = json.dumps(BODY)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            TEXT.replace('"CapDrop"', '"Privileged": true, "Privileged": false, "CapDrop"').encode(),
            "a key occurs twice",
        ),
        ((TEXT[:-1] + ', "HostConfig": {"Binds": ["/:/host"]}}').encode(), "a key occurs twice"),
        (TEXT.encode("utf-16"), "not JSON"),
        (TEXT.encode("utf-8-sig"), "not JSON"),
        (TEXT.encode() + b'{"HostConfig": {"Privileged": true}}', "not JSON"),
        (TEXT.encode() + b"\xff", "not JSON"),
        (TEXT.replace("1073741824", "NaN").encode(), "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"", "not JSON"),
        (b"[]", "the body must be an object"),
        (b"null", "the body must be an object"),
        (TEXT.replace("A=b", "A" * 2**20).encode(), "the body is longer than 1048576 bytes"),
    ],
)
def test_malformed_body_is_refused(parts: Parts, body: bytes, reason: str) -> None:
    parts.refuses(reason, parts.create(body))


def test_chunked_body_is_checked_as_a_whole(parts: Parts) -> None:
    def chunked(body: dict[str, Any]) -> tuple[int, str]:
        text = json.dumps(body).encode()
        pieces = [text[start : start + 7] for start in range(0, len(text), 7)]
        data = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        return parts.ask("POST", f"{V}/containers/create", data, "Transfer-Encoding: chunked")

    parts.refuses("HostConfig.Binds: '/:/host'", chunked(_changed("HostConfig.Binds", ["/:/host"])))
    assert chunked(BODY)[0] == 201


def test_smuggled_request_is_not_forwarded(parts: Parts) -> None:
    """The proxy never forwards bytes: it parses a second request in or after a body as a request to the proxy."""
    inner = f"POST {V}/containers/{FOREIGN}/stop HTTP/1.1\r\nHost: docker\r\n\r\n".encode()
    outer = f"POST {V}/containers/{OWN}/start HTTP/1.1\r\nHost: docker\r\n"
    parts.send(f"{outer}Content-Length: {len(inner)}\r\n\r\n".encode() + inner)
    assert ("POST", f"{V}/containers/{FOREIGN}/stop") not in parts.daemon.requests
    status, _ = parts.send(f"{outer}Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode() + inner)
    assert status == HTTPStatus.BAD_REQUEST
    assert ("POST", f"{V}/containers/{FOREIGN}/stop") not in parts.daemon.requests


@pytest.mark.parametrize(
    "header", ["Upgrade: tcp\r\nConnection: Upgrade", "upgrade: h2c\r\nConnection: upgrade", "Content-Encoding: gzip"]
)
def test_upgrade_and_encoded_body_are_refused(parts: Parts, header: str) -> None:
    parts.refuses("not allowed", parts.ask("POST", f"{V}/containers/{OWN}/start", b"", header))


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/_ping"),
        ("GET", "/info"),
        ("GET", f"{V}/events"),
        ("GET", f"{V}/system/df"),
        ("POST", f"{V}/auth"),
        ("POST", f"{V}/build"),
        ("POST", f"{V}/session"),
        ("POST", f"{V}/commit?container={OWN}"),
        ("GET", f"{V}/containers/json"),
        ("POST", f"{V}/containers/prune"),
        ("POST", f"{V}/containers/{OWN}/exec"),
        ("POST", f"{V}/exec/{OWN}/start"),
        ("POST", f"{V}/containers/{OWN}/attach?stream=1"),
        ("POST", f"{V}/containers/{OWN}/update"),
        ("POST", f"{V}/containers/{OWN}/rename?name=postgres"),
        ("POST", f"{V}/containers/{OWN}/kill"),
        ("DELETE", f"{V}/containers/{OWN}"),
        ("PUT", f"{V}/containers/{OWN}/archive?path=/"),
        ("GET", f"{V}/containers/{OWN}/archive?path=/"),
        ("GET", f"{V}/containers/{OWN}/top"),
        ("GET", f"{V}/images/json"),
        ("GET", f"{V}/images/get?names=x"),
        ("POST", f"{V}/images/load"),
        ("POST", f"{V}/images/{IMAGE}/push"),
        ("POST", f"{V}/images/{IMAGE}/tag?repo=x"),
        ("DELETE", f"{V}/images/{IMAGE}"),
        ("GET", f"{V}/volumes"),
        ("POST", f"{V}/volumes/create"),
        ("GET", f"{V}/networks"),
        ("POST", f"{V}/networks/create"),
        ("POST", f"{V}/networks/host/connect"),
        ("GET", f"{V}/secrets"),
        ("POST", f"{V}/swarm/init"),
        ("POST", f"{V}/services/create"),
        ("POST", f"{V}/plugins/pull?remote=x"),
        ("GET", "/plugins"),
        ("POST", "/grpc"),
        ("HEAD", "/version"),
        ("OPTIONS", f"{V}/containers/create"),
        ("PATCH", f"{V}/containers/create"),
        ("CONNECT", "docker:80"),
    ],
)
def test_call_that_the_worker_does_not_make_is_refused(parts: Parts, method: str, target: str) -> None:
    status, _ = parts.ask(method, target)
    assert status == HTTPStatus.FORBIDDEN
    assert parts.daemon.requests == []


CREATE = f"{V}/containers/create"


@pytest.mark.parametrize(
    "target",
    [
        "/containers/create",
        "/v1.23/containers/create",
        "/v1.40/containers/create",
        "/v2.0/containers/create",
        "/V1.45/containers/create",
        "/v1.45\u0665/containers/create",
        "/v1.45/v1.45/containers/create",
        f"/{CREATE}",
        f"{V}//containers/create",
        f"{V}/containers//create",
        f"{V}/containers/create/",
        f"{V}/containers/./create",
        f"{V}/images/../containers/create",
        f"{V}/../containers/create",
        f"{V}/%2e%2e/containers/create",
        f"{V}/containers%2fcreate",
        f"{V}/containers/%63reate",
        f"{V}/containers/create%00",
        f"{V}/containers/create;x=1",
        f"{V}/containers/create#x",
        f"{V}/Containers/create",
        f"http://docker{CREATE}",
        f"{CREATE}?name=ab&name=cd",
        f"{CREATE}?platform=linux",
        f"{CREATE}?Name=ab",
        f"{CREATE}?name=a%2fb",
        f"{CREATE}?name=ab%0a",
        f"{CREATE}?name",
        f"{CREATE}?&",
        f"{CREATE}?name=server",
        f"{CREATE}?name=PostGres.",
        f"{V}/images/{IMAGE}/../../containers/create",
    ],
)
def test_malformed_path_or_query_is_refused(parts: Parts, target: str) -> None:
    status, _ = parts.ask("POST", target, TEXT.encode())
    assert status in (HTTPStatus.FORBIDDEN, HTTPStatus.BAD_REQUEST)
    assert parts.daemon.requests == []


@settings(max_examples=examples(0.4), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["/", ".", "%2e", "%2f", "containers", "create", OWN, "json", "exec", "v1.45", "images", "@"]),
        max_size=8,
    ).map("".join)
)  # fmt: skip
def test_generated_path_is_an_allowed_call_or_refused(parts: Parts, target: str) -> None:
    parts.daemon.reset()
    parts.ask("GET", f"/{target}")
    # The daemon receives only the plain path of an allowed call.
    assert {asked for _, asked in parts.daemon.requests} <= {f"{V}/containers/{OWN}/json"}


@pytest.mark.parametrize(
    ("method", "call"),
    [("GET", "json"), ("POST", "start"), ("POST", "wait"), ("POST", "stop?t=30"), ("GET", "logs?follow=1")],
)
def test_container_that_the_worker_did_not_create_is_refused(parts: Parts, method: str, call: str) -> None:
    status, message = parts.ask(method, f"{V}/containers/{FOREIGN}/{call}")
    assert (status, "was not created by the worker" in message) == (HTTPStatus.FORBIDDEN, True)
    assert parts.daemon.requests == [("GET", f"{V}/containers/{FOREIGN}/json")], "the proxy reads only the label"
    parts.daemon.reset()
    status, message = parts.ask(method, f"{V}/containers/{ABSENT}/{call}")
    assert (status, message) == (404, f"No such container: {ABSENT}")
    parts.daemon.reset()
    assert parts.ask(method, f"{V}/containers/postgres/{call}")[0] == HTTPStatus.FORBIDDEN, "a name"
    assert parts.daemon.requests == []
    assert parts.ask(method, f"{V}/containers/{OWN}/{call}")[0] in (200, 204)
    assert parts.daemon.requests[-1] == (method, f"{V}/containers/{OWN}/{call}")


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        (f"/images/{IMAGE}/json", True),
        (f"/images/registry.example.com/data/x%40sha256:{'0' * 64}/json", True),
        ("/images/postgres:17/json", False),
        ("/images/create?fromImage=registry.example.com%2Fdata%2Fx&tag=1", True),
        (f"/images/create?fromImage=registry.example.com%2Fdata%2Fx&tag=sha256%3A{'0' * 64}", True),
        ("/images/create?fromImage=registry.example.com%2Fdata%2Fx", False),
        ("/images/create?fromImage=registry.example.com%2Fother%2Fx&tag=1", False),
        ("/images/create?fromImage=registry.example.com%2Fdata%2Fx&tag=1&fromSrc=-", False),
        ("/images/create?fromSrc=http%3A%2F%2Fx&repo=x", False),
        ("/images/create?fromImage=hub&tag=1", False),
    ],
)
def test_only_allowed_images_are_inspected_and_pulled(parts: Parts, target: str, allowed: bool) -> None:
    status, message = parts.ask("POST" if "create" in target else "GET", f"{V}{target}")
    assert (status == 200, status == 403) == (allowed, not allowed), message
    assert len(parts.daemon.requests) == allowed


def test_image_of_docker_hub_is_pulled_only_by_its_full_name() -> None:
    policy = Policy(("team/x:*", "docker.io/team/x:*"), "prefect")
    policy.call("POST", f"{V}/images/create?fromImage=docker.io/team/x&tag=1")
    with pytest.raises(RefusedRequestError, match="names no registry"):
        policy.call("POST", f"{V}/images/create?fromImage=team/x&tag=1")


def test_log_is_streamed(parts: Parts) -> None:
    parts.daemon.may_continue_log.clear()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(180)
        connection.connect(str(parts.socket))
        connection.sendall(f"GET {V}/containers/{OWN}/logs?follow=1 HTTP/1.1\r\nHost: docker\r\n\r\n".encode())
        received = b""
        while b"first\n" not in received:
            received += connection.recv(1000)
        assert b"second" not in received
        parts.loop.call_soon_threadsafe(parts.daemon.may_continue_log.set)
        while b"\x02\0\0\0\0\0\0\x07second\n" not in received:
            received += connection.recv(1000)


def test_daemon_s_stream_ends_when_the_worker_disconnects(parts: Parts) -> None:
    parts.daemon.may_continue_log.clear()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(parts.socket))
        connection.sendall(f"GET {V}/containers/{OWN}/logs?follow=1 HTTP/1.1\r\nHost: docker\r\n\r\n".encode())
        assert b"200 OK" in connection.recv(100)
    wait_until(lambda: parts.daemon.closed_streams == 1, "the end of the stream")


def test_stream_that_the_daemon_closes_early_is_an_error(parts: Parts) -> None:
    parts.daemon.closes_early = True
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        parts.ask("GET", f"{V}/containers/{OWN}/logs")


def test_headers_of_the_worker_are_not_forwarded(parts: Parts) -> None:
    parts.ask("GET", f"{V}/containers/{OWN}/json", b"", "X-Registry-Auth: secret", "Authorization: x", "Cookie: a=b")
    assert {name.lower() for headers in parts.daemon.headers for name in headers} <= {
        "host", "accept", "accept-encoding", "user-agent", "connection",
    }  # fmt: skip


def test_absent_daemon_is_a_clear_error(tmp_path: Path) -> None:
    async def ask() -> tuple[int, str]:
        stop = asyncio.Event()
        serving = asyncio.create_task(Proxy(POLICY, tmp_path / "none.sock").serve(tmp_path / "proxy.sock", stop))
        while not (tmp_path / "proxy.sock").exists():
            await asyncio.sleep(0.01)
        asked = Parts(Daemon(), tmp_path / "proxy.sock", asyncio.get_running_loop())
        answers = [
            await asyncio.to_thread(asked.ask, "GET", path) for path in ("/version", f"{V}/containers/{OWN}/json")
        ]
        stop.set()
        await serving
        assert answers[0][0] == answers[1][0]
        return answers[1]

    status, message = asyncio.run(ask())
    assert status == HTTPStatus.BAD_GATEWAY
    assert "the Docker daemon does not answer the proxy: " in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": "{{ networks }}"}, "networks must be a list without placeholders"),
        ({"networks": []}, "networks must have one name, and has 0"),
        ({"networks": ["prefect", "other"]}, "networks must have one name, and has 2"),
        ({"volumes": ["{{ source }}:/x"]}, "volumes must be a list without placeholders"),
        ({"container_create_kwargs": {"tmpfs": "{{ tmpfs }}"}}, "tmpfs must be a mapping without placeholders"),
    ],
)
def test_template_with_placeholders_for_networks_or_volumes_is_refused(change: dict[str, Any], message: str) -> None:
    template = TEMPLATE | {"job_configuration": TEMPLATE["job_configuration"] | change}
    with pytest.raises(SettingsError, match=message):
        Policy.from_template(template, [IMAGE])


@pytest.mark.parametrize("text", ["[]", "work_pools: []", "work_pools: [{name: default}]", "a: b: c"])
def test_file_without_the_pool_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match="is not a base job template"):
        job_template.read(file, "default")


@flow
def nothing() -> None:
    """Do nothing. No run of this flow is executed."""


async def _submitted(variables: dict[str, Any]) -> Any:
    """Let the Docker worker submit a run, and return the run. An attacker has changed the template on the server."""
    template = json.loads(json.dumps(TEMPLATE).replace("@IMAGE@", IMAGE))
    stolen = copy.deepcopy(template)
    stolen["job_configuration"] |= {"privileged": True, "volumes": ["/:/host"], "image": "evil.example.com/x"}
    stolen["variables"]["properties"] = {name: {} for name in template["variables"]["properties"]}
    pool = f"stolen-{uuid4().hex[:6]}"
    env = {"env": {"PREFECT_API_URL": "http://server:4200/api"}}  # as in Compose
    async with get_client() as client:
        await client.create_work_pool(WorkPoolCreate(name=pool, type="docker", base_job_template=stolen))
        deployment = await client.create_deployment(
            flow_id=await client.create_flow(nothing), name="nothing", work_pool_name=pool
        )
        options: dict[str, Any] = {"work_pool_name": pool, "create_pool_if_not_found": False}
        async with docker_worker(template, **options) as worker:
            await worker.sync_with_backend()
            run = await client.create_flow_run_from_deployment(
                deployment, state=Scheduled(), job_variables=variables | env, name="run-1"
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(600):
                    while (found := await client.read_flow_run(run.id)).state_name != "Crashed":
                        # A busy server may answer a poll or a claim by 503: the next poll is the retry.
                        await worker.get_and_submit_flow_runs()
                        await asyncio.sleep(0.5)
                    return found
            raise AssertionError(await client.read_flow_run(run.id))


@pytest.fixture
def through_proxy(parts: Parts, closed_worker_channels: None) -> Iterator[Parts]:
    """Let the worker use the proxy as its Docker daemon."""
    with (
        patch.dict("os.environ", DOCKER_HOST=f"unix://{parts.socket}"),
        temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}),
    ):
        yield parts


@pytest.mark.usefixtures("prefect_server")
def test_worker_runs_the_container_of_the_trusted_template(
    through_proxy: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker makes exactly these calls, and reports the exit code."""
    (tmp_path / "run-key").write_text("k" * 40)
    monkeypatch.setenv("RUN_CREDENTIALS", str(tmp_path))
    run = asyncio.run(_submitted({"labels": {"team": "a"}, "env.PREFECT_API_AUTH_STRING": "admin:guess"}))
    assert "exited with non-zero status code 3" in run.state.message
    daemon = through_proxy.daemon
    [body] = daemon.bodies
    credentials = [text for text in body["Env"] if text.startswith("PREFECT_API_AUTH_STRING=")]
    assert credentials == [f"PREFECT_API_AUTH_STRING={sign_run('k' * 40, run.id)}"]
    assert body["Image"] == IMAGE
    limits = {"PidsLimit": 1024, "LogConfig": {"Type": "json-file", "Config": {"max-file": "3", "max-size": "10m"}}}
    assert body["HostConfig"] == BODY["HostConfig"] | limits
    assert body["Labels"]["team"] == "a"
    assert body["Labels"]["io.prefect.flow-run-id"] == str(run.id)
    [container] = set(daemon.labels) - {OWN, FOREIGN}
    calls = {(method, target.replace(container, "ID")) for method, target in daemon.requests}
    assert calls == {
        ("GET", "/version"),
        ("GET", f"{V}/images/{IMAGE}/json"),
        ("POST", f"{V}/containers/create?name=run-1"),
        ("GET", f"{V}/containers/ID/json"),
        ("POST", f"{V}/containers/ID/start"),
        ("GET", f"{V}/containers/ID/logs?stderr=1&stdout=1&timestamps=0&follow=1&tail=all"),
        ("POST", f"{V}/containers/ID/wait"),
    }


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"image": "evil.example.com/x:1"}, "the image 'evil.example.com/x:1' is not allowed. Allow it in RUN_IMAGES"),
        *(
            pytest.param(*case, marks=pytest.mark.further)
            for case in (
                ({"image": IMAGE, "name": "postgres"}, "the name 'postgres' is reserved for a service"),
                ({"labels": {"com.docker.compose.project": "prefect"}}, "job variable labels: "),
                ({"mem_limit": 1}, "or allow it in docker/pool.yaml"),
            )
        ),
    ],
)
def test_refused_run_is_crashed_with_the_reason(through_proxy: Parts, variables: dict[str, Any], reason: str) -> None:
    run = asyncio.run(_submitted(variables))
    assert run.state_name == "Crashed"
    assert reason in run.state.message
    assert through_proxy.daemon.bodies == []
