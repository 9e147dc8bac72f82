"""The server behind PgBouncer in transaction mode, on a real cluster: many clients, restarts, automations."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import uuid4

import httpx
import pytest

from orchestration.errors import ClusterError
from tests.cluster.namespace import restricted
from tests.e2e.release import Object, Release, merge_values, server_values
from tests.parts import wait_until

RELEASE = "prefect-server"
POOL, RESERVE = 3, 1
"""Connections of each of two PgBouncer pods. The API's process has up to 15 connections to them."""

CLIENTS = 12
RUNS = 60


@pytest.fixture(scope="module")
def server(cluster: str, image: str) -> Iterator[Release]:
    small = {"requests": {"cpu": "1m", "memory": "32Mi"}, "limits": {"memory": "128Mi"}}
    pgbouncer = {"enabled": True, "defaultPoolSize": POOL, "reservePoolSize": RESERVE, "resources": small}
    with restricted(cluster, "pgbouncer") as namespace:
        release = Release("prefect-server", RELEASE, namespace)
        release.deploy(merge_values(server_values(image), {"pgbouncer": pgbouncer}))
        yield release


@pytest.fixture
def api(server: Release) -> Iterator[httpx.Client]:
    with server.api() as client:
        yield client


def _sessions(server: Release) -> list[Object]:
    """Return the sessions of the server's user in Postgres, with the address and the last statement of each."""
    query = (
        "select coalesce(json_agg(json_build_object('address', host(client_addr), 'query', query)), '[]') "
        "from pg_stat_activity where usename = 'prefect' and backend_type = 'client backend'"
    )
    command = ("psql", "-U", "postgres", "-d", "prefect", "-tAc", query)
    found: list[Object] = json.loads(
        server.namespace.kubectl("exec", f"{RELEASE}-database-0", "--container", "postgres", "--", *command)
    )
    return found


async def _make_runs(api: httpx.Client, runs: int = RUNS) -> list[str]:
    """Make runs that take and release a concurrency slot, with many clients. Return what failed."""
    failed = []
    async with httpx.AsyncClient(
        base_url=api.base_url,
        auth=api.auth,
        headers=api.headers,
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


def test_many_clients_share_few_connections_of_postgres(server: Release, api: httpx.Client) -> None:
    assert asyncio.run(_make_runs(api)) == []
    sessions = _sessions(server)
    poolers = {pod["status"]["podIP"] for pod in server.pods("pgbouncer")}
    pooled = [session for session in sessions if session["address"] in poolers]
    assert 1 <= len(pooled) <= len(poolers) * (POOL + RESERVE)
    direct = [session["query"] for session in sessions if session["address"] not in poolers]
    assert direct == ['LISTEN "prefect_automation_changes"'], "API and services connect through PgBouncer"
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


def test_other_pods_do_not_reach_pgbouncer(server: Release) -> None:
    server.namespace.pod("neighbour")
    home = f"{server.namespace.name}.svc.cluster.local"
    assert server.namespace.connects("neighbour", f"{RELEASE}-api.{home}", 4200)
    assert not server.namespace.connects("neighbour", f"{RELEASE}-pgbouncer.{home}", 6432)
    server.namespace.kubectl("delete", "pod", "neighbour")


def test_rolling_update_of_pgbouncer_breaks_no_request(server: Release, api: httpx.Client) -> None:
    before = {pod["metadata"]["name"] for pod in server.pods("pgbouncer")}

    async def make_runs_meanwhile() -> list[str]:
        server.namespace.kubectl("rollout", "restart", f"deployment/{RELEASE}-pgbouncer")
        waiting = asyncio.create_task(
            asyncio.to_thread(
                server.namespace.kubectl, "rollout", "status", f"deployment/{RELEASE}-pgbouncer", "--timeout=4m"
            )
        )
        failed = []
        while not waiting.done() or server.pods("pgbouncer", terminating=True) != server.pods("pgbouncer"):
            failed += await _make_runs(api, CLIENTS)
        await waiting
        return failed

    assert asyncio.run(make_runs_meanwhile()) == []
    assert not before & {pod["metadata"]["name"] for pod in server.pods("pgbouncer")}


def test_server_survives_killed_pgbouncer_pods(server: Release, api: httpx.Client) -> None:
    before = server.restarts()
    pods = {pod["metadata"]["name"] for pod in server.pods("pgbouncer")}
    for pod in pods:
        # SIGQUIT ends PgBouncer at once. The connection of `kubectl exec` may end with it.
        with contextlib.suppress(ClusterError):
            server.namespace.kubectl("exec", pod, "--container", "pgbouncer", "--", "sh", "-c", "kill -QUIT 1")

    def are_restarted() -> bool:
        states = [pod["status"]["containerStatuses"][0] for pod in server.pods("pgbouncer")]
        return all(state["ready"] and state["restartCount"] for state in states)

    wait_until(are_restarted, "PgBouncer to restart")
    wait_until(lambda: api.post("/flows/count", json={}).is_success, "the API to answer")
    assert asyncio.run(_make_runs(api, CLIENTS)) == []
    assert {pod for pod, count in server.restarts().items() if count != before[pod]} == pods
