"""A real server with access control: each role can make only the calls that it needs."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import websockets

from orchestration.access import ownership
from orchestration.access.credentials import sign_run
from orchestration.access.ownership import DeniedError, Ownership
from orchestration.access.routes import PERMISSIONS, WEBSOCKET, Role, read_routes
from orchestration.prefect_api import Server
from orchestration.prefect_compat.events import task_run_state_event
from orchestration.protocol import EXPECTED_STATE_HEADER
from orchestration.reconciler.actions import carry_out
from orchestration.reconciler.decide import Unclaim
from orchestration.reconciler.model import Run
from tests import server_forks
from tests.orchestration.access.guarded_server import CREDENTIALS, RUN_KEY, SERVER_CREDENTIAL, GuardedServer
from tests.parts import client_of, wait_until

UNKNOWN_ID = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def operator(guarded: GuardedServer) -> Iterator[httpx.Client]:
    with guarded.client(CREDENTIALS["operator"]) as client:
        yield client


@pytest.fixture(scope="module")
def flow(operator: httpx.Client) -> str:
    return str(operator.post("/flows/", json={"name": "guarded"}).raise_for_status().json()["id"])


def _create(client: httpx.Client, path: str, **fields: Any) -> str:
    return str(client.post(path, json=fields).raise_for_status().json()["id"])


@pytest.fixture
def run(operator: httpx.Client, flow: str) -> str:
    return _create(operator, "/flow_runs/", flow_id=flow)


@pytest.fixture
def other(operator: httpx.Client, flow: str) -> str:
    """A run of a deployment."""
    deployment = _create(operator, "/deployments/", name=str(uuid4()), flow_id=flow)
    return _create(operator, f"/deployments/{deployment}/create_flow_run")


RUNNING = {"state": {"type": "RUNNING"}}


@pytest.mark.parametrize("credential", [None, "admin:wrong", "viewer:", "worker:password-of-viewer", "run-x:y"])
def test_unknown_credential_is_refused(guarded: GuardedServer, credential: str | None) -> None:
    with guarded.client(credential) if credential else client_of(guarded.url) as client:
        assert client.post("/flows/count", json={}).status_code == 401
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200


def test_server_credential_has_the_role_operator(guarded: GuardedServer) -> None:
    with guarded.client(SERVER_CREDENTIAL) as client:
        assert client.get("/admin/settings").status_code == 200


@pytest.mark.parametrize("force", [False, True])
def test_state_that_expects_an_older_state_is_aborted(operator: httpx.Client, run: str, force: bool) -> None:
    older = operator.get(f"/flow_runs/{run}").json()["state_id"]
    current = _propose(operator, run, "RUNNING", older, force)
    assert current["status"] == "ACCEPT"
    late = _propose(operator, run, "SCHEDULED", older, force)
    assert late["status"] == "ABORT"
    assert f"not the expected {older}" in late["details"]["reason"]
    found = operator.get(f"/flow_runs/{run}").json()
    assert (found["state_type"], found["state_id"]) == ("RUNNING", current["state"]["id"])
    assert _propose(operator, run, "SCHEDULED", found["state_id"], force)["status"] == "ACCEPT"
    # A request that expects nothing is as before.
    assert _propose(operator, run, "RUNNING", "", force)["status"] == "ACCEPT"


def test_of_concurrent_states_that_expect_the_same_state_one_is_accepted(operator: httpx.Client, run: str) -> None:
    state = operator.get(f"/flow_runs/{run}").json()["state_id"]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: _propose(operator, run, "RUNNING", state, True), range(8)))
    assert sorted(answer["status"] for answer in answers) == ["ABORT"] * 7 + ["ACCEPT"]


def test_late_decision_of_a_reconciler_leaves_a_newer_state(
    guarded: GuardedServer, operator: httpx.Client, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reconciler has read the run, and its request is delayed until another run attempt is Running."""
    _propose(operator, run, "PENDING", "", True)

    async def decide() -> str:
        async with httpx.AsyncClient(base_url=guarded.url, headers=operator.headers, timeout=75) as client:
            server = Server(client, guarded.url)
            read = Run.read(await server.ask("GET", f"/flow_runs/{run}"))

            async def delayed(method: str, path: str, *args: Any, **options: Any) -> Any:
                if path.endswith("/set_state"):
                    _propose(operator, run, "RUNNING", "", True)
                return await Server.ask(server, method, path, *args, **options)

            monkeypatch.setattr(server, "ask", delayed)
            return await carry_out(server, _NoJobs(), Unclaim(read, "No pod"), [], 0)  # type: ignore[arg-type]

    assert asyncio.run(decide()) == ""
    assert operator.get(f"/flow_runs/{run}").json()["state_type"] == "RUNNING"


class _NoJobs:
    """A cluster without Jobs."""

    async def has_unfinished_job(self, _: str) -> bool:
        return False


def _propose(client: httpx.Client, run: str, type_: str, expected: str, force: bool) -> dict[str, Any]:
    body = {"state": {"type": type_}, "force": force}
    answer = client.post(f"/flow_runs/{run}/set_state", json=body, headers={EXPECTED_STATE_HEADER: expected})
    return dict(answer.raise_for_status().json())


@pytest.mark.parametrize(
    "role", [pytest.param(role, marks=() if role is Role.RUN else pytest.mark.further) for role in Role]
)
def test_each_role_is_denied_every_route_without_permission(guarded: GuardedServer, run: str, role: Role) -> None:
    client = guarded.run_client(run) if role is Role.RUN else guarded.client(CREDENTIALS[role])
    with client:
        for route in read_routes():
            if route.method == WEBSOCKET or route.access in PERMISSIONS[role] | {"open"}:
                continue
            path = _fill(route.path)
            answer = client.request(route.method, path, json={})
            assert answer.status_code == 403, f"{role} {route.method} {path}: {answer.status_code}"
            assert answer.json()["detail"] == f"The role {role} has no permission for {route.method} {path}"


def _fill(path: str) -> str:
    return "/".join(UNKNOWN_ID if part.startswith("{") else part for part in path.split("/"))


def test_unknown_route_is_denied_to_everyone(operator: httpx.Client) -> None:
    assert operator.get("/no/such/route").status_code == 403
    assert operator.request("TRACE", "/flows/count").status_code == 403


def test_two_credentials_in_one_request_are_refused(guarded: GuardedServer, run: str) -> None:
    with guarded.run_client(run) as client, guarded.client(SERVER_CREDENTIAL) as admin:
        headers = [
            ("authorization", client.headers["authorization"]),
            ("authorization", admin.headers["authorization"]),
        ]
        assert httpx.get(f"{guarded.url}/admin/settings", headers=headers, timeout=75).status_code == 401


def test_run_reports_itself(guarded: GuardedServer, run: str) -> None:
    with guarded.run_client(run) as client:
        assert client.post(f"/flow_runs/{run}/set_state", json=RUNNING).json()["status"] == "ACCEPT"
        task = _create(client, "/task_runs/", flow_run_id=run, task_key="t", dynamic_key="0")
        assert client.post(f"/task_runs/{task}/set_state", json=RUNNING).is_success
        line = {"name": "n", "level": 20, "message": "m", "timestamp": "2026-01-01T00:00:00Z", "flow_run_id": run}
        assert client.post("/logs/", json=[line]).status_code == 201
        artifact = _create(client, "/artifacts/", flow_run_id=run, key="k", data=1)
        assert client.patch(f"/artifacts/{artifact}", json={"data": 2}).status_code == 204
        assert client.post("/v2/concurrency_limits/increment", json={"names": ["none"], "slots": 1}).is_success


def test_run_reports_its_subflow_runs(guarded: GuardedServer, flow: str, run: str) -> None:
    with guarded.run_client(run) as client:
        child = run
        for _ in range(3):
            task = _create(client, "/task_runs/", flow_run_id=child, task_key="t", dynamic_key="0")
            child = _create(client, "/flow_runs/", flow_id=flow, parent_task_run_id=task)
            assert client.post(f"/flow_runs/{child}/set_state", json=RUNNING).json()["status"] == "ACCEPT"


def test_run_writes_no_other_run(guarded: GuardedServer, operator: httpx.Client, run: str, other: str) -> None:
    task = _create(operator, "/task_runs/", flow_run_id=other, task_key="t", dynamic_key="0")
    artifact = _create(operator, "/artifacts/", flow_run_id=other, key="k", data=1)
    line = {"name": "n", "level": 20, "message": "m", "timestamp": "2026-01-01T00:00:00Z"}
    attacks: list[tuple[str, str, Any]] = [
        ("POST", f"/flow_runs/{other}/set_state", RUNNING),
        ("PATCH", f"/flow_runs/{other}", {"name": "taken"}),
        ("PATCH", f"/flow_runs/{other}/labels", {"a": "b"}),
        ("POST", f"/flow_runs/{other}/resume", {}),
        ("POST", f"/flow_runs/{other}/input", {"key": "k", "value": "v"}),
        ("POST", "/task_runs/", {"flow_run_id": other, "task_key": "t", "dynamic_key": "1"}),
        ("POST", f"/task_runs/{task}/set_state", RUNNING),
        ("PATCH", f"/task_runs/{task}", {"name": "taken"}),
        ("POST", "/artifacts/", {"flow_run_id": other, "key": "k", "data": 2}),
        ("PATCH", f"/artifacts/{artifact}", {"data": 2}),
        ("POST", "/logs/", [line | {"flow_run_id": run}, line | {"flow_run_id": other}]),
        ("POST", "/logs/", line | {"flow_run_id": other}),
    ]
    with guarded.run_client(run) as client:
        for method, path, body in attacks:
            answer = client.request(method, path, json=body)
            assert (answer.status_code, answer.json()["detail"]) == (
                403,
                f"Flow run {run} may not write to flow run {other}",
            ), f"{method} {path}"
        for content in ("[", "[[]]", '{"flow_run_id": 1}', f'{{"flow_run_id": "{run}", "flow_run_id": "{other}"}}'):
            assert client.post("/logs/", content=content).status_code == 403, content

    assert operator.get(f"/flow_runs/{other}").json()["state_type"] == "SCHEDULED"
    assert operator.get(f"/artifacts/{artifact}").json()["data"] == 1


def test_run_creates_no_subflow_run_of_another_run(
    guarded: GuardedServer, operator: httpx.Client, run: str, other: str
) -> None:
    """The other run would use the completed run as the result of a subflow."""
    found = operator.get(f"/flow_runs/{other}").json()
    task = _create(operator, "/task_runs/", flow_run_id=other, task_key="t", dynamic_key="0")
    planted = {"parent_task_run_id": task, "state": {"type": "COMPLETED", "data": 42}}
    create = f"/deployments/{found['deployment_id']}/create_flow_run"
    scheduled = {"idempotency_key": f"scheduled {found['deployment_id']} 2030-01-01", "state": {"type": "COMPLETED"}}
    with guarded.run_client(run) as client:
        for path, body in (
            ("/flow_runs/", planted | {"flow_id": found["flow_id"]}),
            (create, planted),
            (f"{create}/bulk", [planted]),
            (create, scheduled),
        ):
            assert client.post(path, json=body).status_code == 403, path
        assert client.post(create, json={"idempotency_key": "mine"}).is_success


def test_run_cannot_name_its_infrastructure(guarded: GuardedServer, run: str) -> None:
    with guarded.run_client(run) as client:
        answer = client.patch(f"/flow_runs/{run}", json={"infrastructure_pid": "namespace:job-of-another-run"})
        assert answer.status_code == 403
        assert client.patch(f"/flow_runs/{run}", json={"name": "renamed"}).status_code == 204


def test_run_writes_no_log_or_artifact_of_another_run(
    guarded: GuardedServer, operator: httpx.Client, run: str, other: str
) -> None:
    task = _create(operator, "/task_runs/", flow_run_id=other, task_key="t", dynamic_key="0")
    shared = _create(operator, "/artifacts/", key="shared", data=1)
    line = {"name": "n", "level": 20, "message": "m", "timestamp": "2026-01-01T00:00:00Z", "flow_run_id": run}
    with guarded.run_client(run) as client:
        for method, path, body in (
            ("POST", "/logs/", [line | {"task_run_id": task}]),
            ("POST", "/artifacts/", {"key": "k", "data": 1, "task_run_id": task}),
            ("POST", "/artifacts/", {"key": "drift-team", "data": "No drift"}),
            ("PATCH", f"/artifacts/{shared}", {"data": 2}),
        ):
            assert client.request(method, path, json=body).status_code == 403, f"{method} {path}"
        assert client.post("/artifacts/", json={"key": "shared", "data": 3}).is_success


def _task_run_event(task_run: str, flow_run: str, state: str = "COMPLETED", **task_run_fields: Any) -> dict[str, Any]:
    """Return the event from which the server makes a task run and its state."""
    about = {"name": "t", "task_key": "t", "dynamic_key": "0", "run_count": 1} | task_run_fields
    related = [{"prefect.resource.id": f"prefect.flow-run.{flow_run}", "prefect.resource.role": "flow-run"}]
    body = {"type": state, "name": state.title(), "message": ""}
    event = task_run_state_event(UUID(task_run), body, datetime.now(UTC), about, related)
    return dict(event)


def _flow_run_event(flow_run: str, name: str) -> dict[str, Any]:
    resource = {"prefect.resource.id": f"prefect.flow-run.{flow_run}"}
    return {"event": name, "resource": resource, "occurred": datetime.now(UTC).isoformat(), "id": str(uuid4())}


def _artifact_event(flow_run: str) -> dict[str, Any]:
    """Return the event that Prefect's client emits about a new artifact."""
    related = [{"prefect.resource.id": f"prefect.flow-run.{flow_run}", "prefect.resource.role": "flow-run"}]
    resource = {"prefect.resource.id": f"prefect.artifact.{uuid4()}"}
    return _flow_run_event(flow_run, "prefect.artifact.created") | {"resource": resource, "related": related}


def test_run_emits_no_prefect_event_about_another_run(
    guarded: GuardedServer, operator: httpx.Client, run: str, other: str
) -> None:
    foreign = _create(operator, "/task_runs/", flow_run_id=other, task_key="t", dynamic_key="0")
    own = str(uuid4())
    denied = [
        _task_run_event(foreign, other),
        _task_run_event(foreign, run),
        _task_run_event(own, other),
        _task_run_event(own, run, id=foreign),
        _task_run_event(own, run, flow_run_id=other),
        _flow_run_event(other, "prefect.flow-run.Cancelling"),
        _flow_run_event(other, "prefect.flow-run"),
        _flow_run_event(run, "prefect.deployment.disabled"),
        _artifact_event(other),
        {"event": 1},
        {},
    ]
    allowed = [
        _task_run_event(own, run),
        _flow_run_event(run, "prefect.flow-run.heartbeat"),
        _flow_run_event(run, "prefect.asset.referenced"),
        _artifact_event(run),
        _artifact_event(run) | {"event": "prefect.runner.cancelled-flow-run"},
        _flow_run_event(other, "shop.order-received"),
    ]
    with guarded.run_client(run) as client:
        for event in denied:
            assert client.post("/events", json=[*allowed, event]).status_code == 403, event

    async def emit() -> None:
        url = guarded.url.replace("http://", "ws://") + "/events/in"
        async with websockets.connect(url, subprotocols=[websockets.Subprotocol("prefect")], open_timeout=75) as socket:
            await socket.send(json.dumps({"type": "auth", "token": sign_run(RUN_KEY, UUID(run))}))
            assert json.loads(await socket.recv())["type"] == "auth_success"
            texts: list[str | bytes] = [b"{}", "not JSON", "[]", *map(json.dumps, denied), *map(json.dumps, allowed)]
            for text in texts:
                await socket.send(text)
            await socket.close()

    asyncio.run(emit())
    # The server records events in their order.
    wait_until(lambda: operator.get(f"/task_runs/{own}").is_success, "the run's task run")
    assert operator.get(f"/task_runs/{own}").json()["flow_run_id"] == run
    found = operator.get(f"/task_runs/{foreign}").json()
    assert found["flow_run_id"] == other
    assert found["state_type"] != "COMPLETED"


def test_task_run_that_is_not_recorded_yet_is_looked_up_once(
    guarded: GuardedServer, operator: httpx.Client, run: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []

    async def note(request: httpx.Request) -> None:
        reads.append(request.url.path)

    async def check() -> None:
        client = httpx.AsyncClient(
            base_url=guarded.url, headers=operator.headers, timeout=75, event_hooks={"request": [note]}
        )
        async with client:
            checked = Ownership(client)

            async def name(task_run: str, flow_run: str, state: str = "RUNNING") -> None:
                await checked.check_event(UUID(flow_run), _task_run_event(task_run, flow_run, state))

            monkeypatch.setattr(ownership, "UNRECORDED_SECONDS", 600)
            own = str(uuid4())
            for state in ("PENDING", "RUNNING", "COMPLETED"):
                await name(own, run, state)
            assert len(reads) == 1
            await name(own, other)
            assert len(reads) == 2, "another run is checked"
            monkeypatch.setattr(ownership, "UNRECORDED_SECONDS", 0)
            foreign = str(uuid4())
            await name(foreign, run)
            _create(operator, "/task_runs/", id=foreign, flow_run_id=other, task_key="t", dynamic_key=foreign)
            with pytest.raises(DeniedError):
                await name(foreign, run)

    asyncio.run(check())


def test_run_cannot_pose_as_an_automation(guarded: GuardedServer, operator: httpx.Client, run: str) -> None:
    flow = operator.get(f"/flow_runs/{run}").json()["flow_id"]
    headers = {"Prefect-Automation-Id": str(uuid4()), "Prefect-Automation-Name": "bm90IG1pbmU="}
    with guarded.run_client(run) as client:
        created = client.post("/flow_runs/", json={"flow_id": flow}, headers=headers).raise_for_status().json()
    assert "AUTOMATION" not in json.dumps(created["created_by"])


def test_run_cannot_write_a_deployment_run_that_it_created(
    guarded: GuardedServer, operator: httpx.Client, run: str
) -> None:
    flow = operator.get(f"/flow_runs/{run}").json()["flow_id"]
    deployment = _create(operator, "/deployments/", name=str(uuid4()), flow_id=flow)
    with guarded.run_client(run) as client:
        task = _create(client, "/task_runs/", flow_run_id=run, task_key="t", dynamic_key="0")
        path = f"/deployments/{deployment}/create_flow_run"
        created = _create(client, path, parent_task_run_id=task)
        assert client.get(f"/flow_runs/{created}").is_success
        assert client.post(f"/flow_runs/{created}/set_state", json=RUNNING).status_code == 403


@pytest.mark.parametrize(
    ("role", "path", "is_open"),
    [
        ("worker", "/events/in", True),
        ("worker", "/events/out", True),
        ("viewer", "/events/in", False),
        ("viewer", "/logs/out", True),
        ("run", "/task_runs/subscriptions/scheduled", False),
        ("run", "/work_pools/default/workers/connect", False),
        ("unknown", "/logs/out", False),
    ],
)
def test_websocket_needs_the_permission_of_its_route(
    guarded: GuardedServer, run: str, role: str, path: str, is_open: bool
) -> None:
    tokens = CREDENTIALS | {"run": sign_run(RUN_KEY, UUID(run)), "unknown": "a:b"}

    async def connect() -> str | int:
        """Return the type of the server's answer, or the code with which the server closes."""
        url = guarded.url.replace("http://", "ws://") + path
        async with websockets.connect(url, subprotocols=[websockets.Subprotocol("prefect")], open_timeout=75) as socket:
            await socket.send(json.dumps({"type": "auth", "token": tokens[role]}))
            try:
                return str(json.loads(await socket.recv())["type"])
            except websockets.ConnectionClosed:
                return socket.close_code or 0

    assert asyncio.run(connect()) == ("auth_success" if is_open else 1008)


def test_audit_log_has_each_write_and_denial(guarded: GuardedServer, run: str, other: str) -> None:
    with guarded.run_client(run) as client:
        client.post(f"/flow_runs/{run}/set_state", json=RUNNING)
        client.post(f"/flow_runs/{other}/set_state", json=RUNNING)
        client.post("/flow_runs/filter", json={})

    def lines() -> list[tuple[str, str, int]]:
        found = [line for line in guarded.audit() if line["user"] == f"run-{run}"]
        assert all(line["role"] == "run" and line["client"] == "127.0.0.1" and line["time"] for line in found)
        return [(line["method"], line["path"], line["status"]) for line in found]

    expected = [("POST", f"/flow_runs/{run}/set_state", 201), ("POST", f"/flow_runs/{other}/set_state", 403)]
    wait_until(lambda: lines() == expected, "two audit lines")
    assert "password-of" not in guarded.log.read_text()


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({}, [], "set API_CREDENTIALS"),
        pytest.param({"API_CREDENTIALS": "/absent"}, [], "cannot be read", marks=pytest.mark.further),
        pytest.param(
            {"API_CREDENTIALS": "/absent"},
            ["--workers=2"],
            "use api.replicas instead of --workers",
            marks=pytest.mark.further,
        ),
        ({"PREFECT_SERVER_API_AUTH_STRING": ""}, [], "The server has no credential"),
    ],
)
def test_server_does_not_start_without_credentials(
    tmp_path: Path, environment: dict[str, str], arguments: list[str], message: str
) -> None:
    base = {"PATH": "/usr/bin:/bin", "PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_API_AUTH_STRING": SERVER_CREDENTIAL}
    if "PREFECT_SERVER_API_AUTH_STRING" in environment:
        base["API_CREDENTIALS"] = str(tmp_path)
    command = ["orchestration.access", "server", "start", *arguments]
    ended = server_forks.run(command, base | environment, tmp_path)
    assert ended.returncode == 1
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
