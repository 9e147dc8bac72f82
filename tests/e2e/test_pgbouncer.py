"""The server with PgBouncer in transaction mode and oauth2-proxy, with TLS, on a real cluster.

Many clients, restarts and automations; people who log in at a real identity provider; then a work pool that reaches the
API by HTTPS.
"""

import asyncio
import base64
import contextlib
import functools
import itertools
import json
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster.certificates import Authority
from tests.cluster.namespace import restricted
from tests.e2e.pace import DRIFT_SECONDS, IDLE_ROUND_SECONDS
from tests.e2e.release import Object, Pool, Release, calm_server_values, install_pool, merge_values, pool_values
from tests.e2e.runs import create_deployment, start_run, wait_until_ended
from tests.e2e.single_sign_on import ISSUER, ISSUER_PORT, install_issuer, oidc_values, single_sign_on
from tests.orchestration.access.single_sign_on import FORGED, HOST, SingleSignOn
from tests.parts import wait_until

RELEASE = "prefect-server"
POOL, RESERVE = 3, 1
"""Connections of each of two PgBouncer pods. The API's process has up to 15 connections to them."""

CLIENTS = 12
RUNS = 2 * CLIENTS


pytestmark = pytest.mark.further


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder for the certificates of the server and of its CA."""
    return tmp_path_factory.mktemp("certificates")


def _secret(name: str, folder: Path, *files: str) -> Object:
    data = {file: base64.b64encode((folder / file).read_bytes()).decode() for file in files}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}


@pytest.fixture(scope="module")
def server(cluster: str, image: str, certificates: Path) -> Iterator[Release]:
    small = {"requests": {"cpu": "1m", "memory": "32Mi"}, "limits": {"memory": "128Mi"}}
    pgbouncer = {"enabled": True, "defaultPoolSize": POOL, "reservePoolSize": RESERVE, "resources": small}
    with restricted(cluster, "pgbouncer") as namespace:
        services = [f"{RELEASE}-{component}" for component in ("api", "database", "oidc", "pgbouncer", "redis")]
        names = ["localhost", *services, *(f"{name}.{namespace.name}" for name in services)]
        Authority(certificates).issue("tls", RELEASE, hosts=names)
        Authority(certificates / "other")
        namespace.apply(
            _secret("tls", certificates, "ca.crt", "tls.crt", "tls.key"),
            _secret("ca", certificates, "ca.crt"),
            _secret("other-ca", certificates / "other", "ca.crt"),
        )
        release = Release("prefect-server", RELEASE, namespace)
        issuer = install_issuer(namespace, certificates / "issuer")
        changed = {
            "pgbouncer": pgbouncer,
            "tls": {"enabled": True, "existingSecret": "tls"},
            "oidc": oidc_values(namespace),
            "networkPolicy": {"egressCIDRs": [f"{issuer}/32"]},
        }
        release.deploy(merge_values(calm_server_values(image), changed))
        yield release


@pytest.fixture(scope="module")
def values_of_pool(image: str) -> Object:
    paced = {"reconciler": {"everySeconds": IDLE_ROUND_SECONDS}, "drift": {"everySeconds": max(60, DRIFT_SECONDS)}}
    api = {"url": f"https://{RELEASE}-api:4200/api", "tls": {"caSecret": "ca"}}
    return merge_values(pool_values(image), paced | {"api": api})


@pytest.fixture(scope="module")
def pool(server: Release, values_of_pool: Object, probe: Object) -> Pool:
    """Install a work pool next to the server."""
    return install_pool(server, server.namespace, values_of_pool, probe)


@pytest.fixture
def api(server: Release) -> Iterator[httpx.Client]:
    with server.api() as client:
        yield client


def _sessions(server: Release) -> list[Object]:
    """Return the sessions of the server's user in Postgres: address, TLS and the last statement of each."""
    query = (
        "select coalesce(json_agg(json_build_object('address', host(client_addr), 'tls', ssl, 'query', query)), '[]') "
        "from pg_stat_activity join pg_stat_ssl using (pid) "
        "where usename = 'prefect' and backend_type = 'client backend'"
    )
    command = ("psql", "-U", "postgres", "-d", "prefect", "-tAc", query)
    found: list[Object] = json.loads(
        server.namespace.kubectl("exec", f"{RELEASE}-database-0", "--container", "postgres", "--", *command)
    )
    return found


async def _make_runs(api: httpx.Client, certificates: Path, runs: int = RUNS) -> list[str]:
    """Make runs that take and release a concurrency slot, with many clients. Return what failed."""
    failed = []
    async with httpx.AsyncClient(
        base_url=api.base_url,
        auth=api.auth,
        headers=api.headers,
        verify=ssl.create_default_context(cafile=certificates / "ca.crt"),
        timeout=90,
        limits=httpx.Limits(max_connections=CLIENTS),
    ) as client:

        async def post(path: str, body: Object, *allowed: int) -> httpx.Response:
            answer = await client.post(path, json=body)
            if not answer.is_success and answer.status_code not in allowed:
                failed.append(f"{path}: {answer.status_code} {answer.text[:100]}")
            return answer

        flow = (await post("flows/", {"name": f"flow-{uuid4().hex[:6]}"})).json()["id"]
        deployment = (await post("deployments/", {"name": "many", "flow_id": flow})).json()["id"]
        limit = f"slots-{uuid4().hex[:6]}"
        slots: Object = {"names": [limit], "slots": 1}
        await post("v2/concurrency_limits/", {"name": limit, "limit": 2})

        async def make(number: int) -> None:
            scheduled = {"state": {"type": "SCHEDULED"}}
            run = (await post(f"deployments/{deployment}/create_flow_run", scheduled)).json().get("id")
            await post(f"flow_runs/{run}/set_state", {"state": {"type": "PENDING"}})
            await post("task_runs/", {"flow_run_id": run, "task_key": "task", "dynamic_key": str(number)})
            if (await post("v2/concurrency_limits/increment", slots, 423)).is_success:
                await post("v2/concurrency_limits/decrement", slots)

        await asyncio.gather(*map(make, range(runs)))
        counted = await post("flow_runs/count", {"deployments": {"id": {"any_": [deployment]}}})
        if counted.json() != runs:
            failed.append(f"{counted.text} of {runs} runs")
    return failed


def test_many_clients_share_few_connections_of_postgres(server: Release, api: httpx.Client, certificates: Path) -> None:
    assert asyncio.run(_make_runs(api, certificates)) == []
    sessions = _sessions(server)
    poolers = {pod["status"]["podIP"] for pod in server.pods("pgbouncer")}
    pooled = [session for session in sessions if session["address"] in poolers]
    assert 1 <= len(pooled) <= len(poolers) * (POOL + RESERVE)
    direct = [session["query"] for session in sessions if session["address"] not in poolers]
    assert direct == ['LISTEN "prefect_automation_changes"'], "API and services connect through PgBouncer"
    assert all(session["tls"] for session in sessions)
    assert not any(server.restarts().values())


def test_services_learn_of_an_automation_that_is_made_while_they_run(api: httpx.Client) -> None:
    name = f"automation-{uuid4().hex[:6]}"
    trigger = {"type": "event", "posture": "Reactive", "expect": [name], "threshold": 1, "within": 0}
    action = {"type": "do-nothing"}
    made = api.post("/automations/", json={"name": name, "trigger": trigger, "actions": [action]}).raise_for_status()
    resource = {"prefect.resource.id": f"prefect.automation.{made.json()['id']}"}

    def has_fired() -> bool:
        now = datetime.now(UTC).isoformat()
        event = {"id": str(uuid4()), "occurred": now, "event": name, "resource": {"prefect.resource.id": "thing"}}
        api.post("/events", json=[event]).raise_for_status()
        wanted = {"event": {"name": ["prefect.automation.triggered"]}, "resource": {"id": list(resource.values())}}
        return bool(api.post("/events/filter", json={"filter": wanted}).raise_for_status().json()["events"])

    wait_until(has_fired, "the automation to fire")


PLAIN = """
import socket
with socket.create_connection(("{host}", {port}), 30) as connection:
    connection.sendall({request!r})
    try:
        print(connection.recv(200))
    except ConnectionError:
        print("closed")
"""
"""Sends a request without TLS, and prints the answer."""


def test_servers_refuse_plain_connections(server: Release) -> None:
    def answer(pod: str, port: int, request: bytes) -> str:
        code = PLAIN.format(host=f"{RELEASE}-{pod}", port=port, request=request)
        return server.namespace.kubectl("exec", f"deployment/{RELEASE}-services", "--", "python", "-c", code)

    http, startup = b"GET /api/health HTTP/1.1\r\nHost: a\r\n\r\n", b"\0\0\0\x10\0\x03\0\0user\0a\0\0"
    assert "HTTP/1.1" not in answer("api", 4200, http)
    assert "no encryption" in answer("database", 5432, startup), "the services reach Postgres for notifications"
    assert "SSL required" in answer("pgbouncer", 6432, startup)
    assert "PONG" not in answer("redis", 6379, b"PING\r\n")


def test_other_pods_do_not_reach_pgbouncer(server: Release) -> None:
    server.namespace.pod("neighbour")
    home = f"{server.namespace.name}.svc.cluster.local"
    api_is_reached = functools.partial(server.namespace.connects, "neighbour", f"{RELEASE}-api.{home}", 4200)
    wait_until(api_is_reached, "the cluster's DNS to have the API's address")
    assert not server.namespace.connects("neighbour", f"{RELEASE}-pgbouncer.{home}", 6432)
    server.namespace.kubectl("delete", "pod", "neighbour")


def test_rolling_update_of_pgbouncer_breaks_no_request(server: Release, api: httpx.Client, certificates: Path) -> None:
    before = {pod["metadata"]["name"] for pod in server.pods("pgbouncer")}

    async def make_runs_meanwhile() -> list[str]:
        server.namespace.kubectl("rollout", "restart", f"deployment/{RELEASE}-pgbouncer")
        waiting = asyncio.create_task(
            asyncio.to_thread(
                server.namespace.kubectl, "rollout", "status", f"deployment/{RELEASE}-pgbouncer", "--timeout=4m"
            )
        )
        failed = []
        # A pod that ends closes connections that were idle for a second: before, at and after that moment.
        pauses = itertools.cycle((0.2, 1, 2))
        while not waiting.done() or any(
            "deletionTimestamp" in pod["metadata"] for pod in server.pods("pgbouncer", terminating=True)
        ):
            failed += await _make_runs(api, certificates, 2 * (POOL + RESERVE))
            # Without a pause the requests take a processor until the end of the rollout.
            await asyncio.sleep(next(pauses))
        await waiting
        return failed

    assert asyncio.run(make_runs_meanwhile()) == []
    assert not before & {pod["metadata"]["name"] for pod in server.pods("pgbouncer")}


def test_server_survives_killed_pgbouncer_pods(server: Release, api: httpx.Client, certificates: Path) -> None:
    before = server.restarts()
    pods = {pod["metadata"]["name"] for pod in server.pods("pgbouncer")}

    def are_restarted() -> bool:
        found = server.pods("pgbouncer")
        for pod in found:
            if pod["status"]["containerStatuses"][0]["restartCount"] == before[pod["metadata"]["name"]]:
                # SIGQUIT ends PgBouncer at once. The connection of `kubectl exec` may end with it, or not begin.
                with contextlib.suppress(ClusterError):
                    command = ("--container", "pgbouncer", "--", "sh", "-c", "kill -QUIT 1")
                    server.namespace.kubectl("exec", pod["metadata"]["name"], *command)
        states = {pod["metadata"]["name"]: pod["status"]["containerStatuses"][0] for pod in found}
        return all(state["ready"] and state["restartCount"] > before[pod] for pod, state in states.items())

    wait_until(are_restarted, "PgBouncer to restart")
    wait_until(lambda: api.post("/flows/count", json={}).is_success, "the API to answer")
    assert asyncio.run(_make_runs(api, certificates, CLIENTS)) == []
    assert {pod for pod, count in server.restarts().items() if count != before[pod]} == pods


@contextlib.contextmanager
def _signed_on(server: Release, certificates: Path) -> Iterator[SingleSignOn]:
    with single_sign_on(server, certificates / "ca.crt", certificates / "issuer" / "ca.crt") as found:
        yield found


@pytest.fixture(scope="module")
def sign_on(server: Release, certificates: Path) -> Iterator[SingleSignOn]:
    with _signed_on(server, certificates) as found:
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
    return client.post("/flows/", json={"name": f"flow-{uuid4().hex[:6]}"}, headers=headers).status_code


def test_groups_of_the_identity_provider_decide_what_people_may_do(
    sign_on: SingleSignOn, operator: httpx.Client, viewer: httpx.Client
) -> None:
    assert _create(operator) == 201
    assert _create(viewer) == 403
    for person in (operator, viewer):
        assert person.post("/flows/filter", json={}).status_code == 200
    with sign_on.browser() as browser:
        refused = sign_on.log_in(browser, "nora")
        assert (refused.url.host, refused.status_code) == (HOST, 403), "a person in none of the groups"
        assert browser.get("/api/admin/version").status_code == 401


def test_audit_log_of_the_api_has_the_addresses_of_people(
    server: Release, operator: httpx.Client, viewer: httpx.Client
) -> None:
    path = f"/concurrency_limits/tag/audited-{uuid4().hex[:6]}/reset"
    for person in (operator, viewer):
        person.post(path, json={})

    def read_users() -> set[tuple[str, str, int]]:
        log = server.namespace.kubectl("logs", f"deployment/{RELEASE}-api", "--tail=-1")
        lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"audit"')]
        return {(line["user"], line["role"], line["status"]) for line in lines if line["path"] == path}

    # The container runtime writes the log a little later.
    wait_until(lambda: len(read_users()) == 2, "the audit log")
    assert read_users() == {("olga@example.com", "operator", 404), ("vera@example.com", "viewer", 403)}


def test_events_stream_to_a_person_who_has_logged_in(sign_on: SingleSignOn, operator: httpx.Client) -> None:
    name = f"event-{uuid4().hex[:6]}"
    with sign_on.websocket(operator, "/api/events/out") as stream:
        stream.send(json.dumps({"type": "auth", "token": None}))
        assert json.loads(stream.recv(75))["type"] == "auth_success"
        # By default the stream has events until the moment at which the server reads the filter.
        until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        stream.send(json.dumps({"type": "filter", "filter": {"event": {"name": [name]}, "occurred": {"until": until}}}))

        def receive() -> Object | None:
            """Send an event, as the stream may begin later than the first one, and return what the stream has."""
            event = {"id": str(uuid4()), "occurred": datetime.now(UTC).isoformat(), "event": name}
            operator.post("/events", json=[event | {"resource": {"prefect.resource.id": "thing"}}]).raise_for_status()
            with contextlib.suppress(TimeoutError):
                found: Object = json.loads(stream.recv(2))
                return found
            return None

        assert wait_until(receive, "an event")["event"]["event"] == name


CALL = """
import json, ssl, sys, urllib.error, urllib.request
for headers in json.loads({headers!r}):
    call = urllib.request.Request({url!r}, b'{{"name": "forged"}}', headers | {{"Content-Type": "application/json"}})
    try:
        print(urllib.request.urlopen(call, context=ssl._create_unverified_context(), timeout=30).status)
    except urllib.error.HTTPError as refused:
        print(refused.code)
"""
"""Tries to create a flow with each of the headers, and prints the status of each answer."""


def test_forged_headers_have_no_effect(server: Release, sign_on: SingleSignOn, viewer: httpx.Client) -> None:
    """Attack: through oauth2-proxy, and at the API's Service from a pod that policies take for oauth2-proxy."""
    stranger, viewers = (
        {"Authorization": "Basic " + base64.b64encode(credential.encode()).decode()}
        for credential in (f"olga@example.com:{'x' * 48}", server.secret(f"{RELEASE}-api-roles", "viewer"))
    )
    assert _create(viewer, **FORGED) == 403
    assert _create(viewer, **FORGED | stranger) == 403
    with sign_on.browser() as browser:
        browser.base_url = f"https://{HOST}/api"
        assert _create(browser, **FORGED) == 401
        assert _create(browser, **FORGED | viewers) == 401, "oauth2-proxy takes no password"

    labels = server.pods("oidc")[0]["metadata"]["labels"]
    del labels["pod-template-hash"]
    never_ready = {"exec": {"command": ["false"]}}  # so that the Service does not lead to it
    server.namespace.pod("impostor", labels=labels, container={"readinessProbe": never_ready}, ready=False)
    server.namespace.kubectl("wait", "--for=jsonpath={.status.phase}=Running", "pod/impostor", "--timeout=300s")
    reach = functools.partial(server.namespace.connects, "impostor")
    wait_until(lambda: reach(f"{RELEASE}-api", 4200), "the API's address")
    url = f"https://{RELEASE}-api:4200/api/flows/"
    headers = json.dumps([FORGED, FORGED | stranger, FORGED | viewers])
    answers = server.namespace.python("impostor", CALL.format(headers=headers, url=url)).split()
    assert answers == ["401", "401", "403"]
    # Policies apply to a new pod after a second or so.
    wait_until(lambda: not reach(f"{RELEASE}-oidc", 4200), "an address outside networkPolicy.egressCIDRs to be closed")
    assert reach(ISSUER, ISSUER_PORT), "the one address in networkPolicy.egressCIDRs"
    server.namespace.kubectl("delete", "pod", "impostor")


def test_sessions_outlive_the_pods_of_oauth2_proxy(
    server: Release, certificates: Path, sign_on: SingleSignOn, viewer: httpx.Client
) -> None:
    killed = [pod["metadata"]["name"] for pod in server.pods("oidc")]
    server.namespace.kubectl("delete", "pod", *killed, "--force", "--grace-period=0")

    def are_replaced() -> bool:
        pods = [pod for pod in server.pods("oidc") if pod["metadata"]["name"] not in killed]
        states = [state for pod in pods for state in pod["status"].get("containerStatuses", [])]
        return len(pods) == len(killed) and len(states) == len(pods) and all(state["ready"] for state in states)

    wait_until(are_replaced, "new pods of oauth2-proxy")
    with _signed_on(server, certificates) as again, again.browser() as browser:
        browser.cookies = viewer.cookies
        assert browser.get("/api/admin/version").status_code == 200
        assert browser.post("/api/flows/", json={"name": "flow"}).status_code == 403


def test_run_of_the_pool_uses_the_api_over_https(server: Release, api: httpx.Client, pool: Pool) -> None:
    run = start_run(api, create_deployment(api, pool))
    assert wait_until_ended(api, run)["state_type"] == "COMPLETED"
    for release in (server, pool):
        assert "Phase:          Succeeded" in release.helm("test", release.name)
    for component in ("worker", "drift", "reconciler"):
        log = pool.namespace.kubectl("logs", f"deployment/{pool.name}-{component}", "--tail=-1")
        assert "certificate" not in log


def test_secret_with_the_private_key_is_refused_for_runs(pool: Pool, values_of_pool: Object) -> None:
    with pytest.raises(ClusterError, match="names the Secret tls, which has a private key in namespace"):
        pool.deploy(merge_values(values_of_pool, {"api": {"tls": {"caSecret": "tls"}}}))


def test_worker_with_another_ca_ends_with_one_message(pool: Pool) -> None:
    name = f"deployment/{pool.name}-worker"
    volumes = [{"name": "api-ca", "secret": {"secretName": "other-ca"}}]
    running = {pod["metadata"]["name"] for pod in pool.pods("worker")}
    pool.namespace.kubectl("patch", name, "--patch", json.dumps({"spec": {"template": {"spec": {"volumes": volumes}}}}))

    def read_log() -> str:
        for pod in pool.pods("worker"):
            [state] = pod["status"].get("containerStatuses") or [{"restartCount": 0}]
            if pod["metadata"]["name"] not in running and state["restartCount"]:
                with contextlib.suppress(ClusterError):
                    return pool.namespace.kubectl("logs", pod["metadata"]["name"], "--previous")
        return ""

    [message] = wait_until(read_log, "the worker to restart", 300).splitlines()
    assert "cannot be used: its certificate is refused (" in message
    pool.namespace.kubectl("rollout", "undo", name)
