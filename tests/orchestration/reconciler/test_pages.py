"""Tests that a round reads all pages of runs, Jobs and pods, and steady runs only if they change."""

import asyncio
from datetime import timedelta
from uuid import uuid4

import httpx
import pytest

from orchestration import prefect_api
from orchestration.prefect_api import Server
from orchestration.prefect_protocol import FLOW_RUN_ID_VARIABLE
from orchestration.protocol import POOL_LABEL, RUN_LABEL
from orchestration.reconciler import kubernetes_client as kubernetes
from orchestration.reconciler.loop import MAX_STEADY_RUNS
from orchestration.reconciler.model import Run
from orchestration.reconciler.snapshot import _read_runs, _read_steady_runs
from tests.cluster.namespace import RESTRICTED, Namespace, proxied
from tests.orchestration.inspection.work_pool import WorkPool
from tests.parts import client_of


@pytest.mark.parametrize("number", [0, 3, 4])
def test_all_pages_of_runs_are_read(prefect_server: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(prefect_api, "PAGE_SIZE", 2)
    with client_of(prefect_server) as client:
        pool = WorkPool(client)
        made = {pool.run({"type": "RUNNING"})["id"] for _ in range(number)}

    async def read() -> list[str]:
        async with httpx.AsyncClient(base_url=prefect_server, timeout=75) as client:
            running = {"state": {"type": {"any_": ["RUNNING"]}}}
            return [run.id for run in await _read_runs(Server(client, prefect_server), pool.name, running)]

    found = asyncio.run(read())
    assert len(found) == number
    assert set(found) == made


def test_steady_runs_are_counted_and_read_only_after_change(prefect_server: str) -> None:
    with client_of(prefect_server) as client:
        pool = WorkPool(client)
        made = [pool.run({"type": "RUNNING"})["id"] for _ in range(4)]
        other = pool.run({"type": "RUNNING"})["id"]

        def read(steady: dict[str, Run] | None) -> tuple[dict[str, Run], list[str]]:
            requests: list[str] = []

            async def note(request: httpx.Request) -> None:
                requests.append(request.url.path.removeprefix("/api"))

            async def ask() -> list[Run]:
                hooks = {"request": [note]}
                async with httpx.AsyncClient(base_url=prefect_server, timeout=75, event_hooks=hooks) as client:
                    server = Server(client, prefect_server)
                    if steady is None:
                        return await _read_runs(server, pool.name, {"id": {"any_": made}})
                    return await _read_steady_runs(server, pool.name, steady)

            return {steady_run.id: steady_run for steady_run in asyncio.run(ask())}, requests

        def state(run: str, type_: str) -> None:
            body = {"state": {"type": type_}, "force": True}
            client.post(f"/flow_runs/{run}/set_state", json=body).raise_for_status()

        steady, _ = read(None)
        assert read({}) == ({}, [])
        assert read(steady) == (steady, ["/flow_runs/count"])

        state(made[0], "CANCELLING")
        state(made[1], "COMPLETED")
        state(other, "COMPLETED")
        found, requests = read(steady)
        assert {steady_run.id: steady_run.type for steady_run in found.values()} == dict(
            zip(made, ["CANCELLING", "COMPLETED", "RUNNING", "RUNNING"], strict=True)
        )
        assert [found[run_id] for run_id in made[2:]] == [steady[run_id] for run_id in made[2:]]
        assert requests == ["/flow_runs/count", "/flow_runs/filter"]

        client.delete(f"/flow_runs/{made[2]}").raise_for_status()
        assert set(read(steady)[0]) == set(made[:2]), "which run was deleted is unknown"
        many = {str(uuid4()): steady[made[3]] for _ in range(MAX_STEADY_RUNS)}
        assert read(many) == ({}, requests), "more ids than a database takes"


@pytest.mark.parametrize("name", ["prefect-job", "renamed"])
def test_all_pages_of_jobs_and_pods_are_read(namespace: Namespace, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The main container is found, also if an injector has renamed it."""
    monkeypatch.setattr(kubernetes, "PAGE", 2)
    pool, number = str(uuid4()), 5
    labels = [{POOL_LABEL: pool, RUN_LABEL: str(uuid4())} for _ in range(number)]
    proxy = {"name": "aaa", "image": "none", "securityContext": RESTRICTED}
    container = proxy | {"name": name, "env": [{"name": FLOW_RUN_ID_VARIABLE, "value": "r"}]}
    # No node has this label, so no container is executed.
    spec = {"containers": [proxy, container], "restartPolicy": "Never", "nodeSelector": {"no": "node"}}
    namespace.apply(
        *(
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": f"job-{index}", "labels": pod_labels},
                "spec": {"suspend": True, "template": {"metadata": {"labels": pod_labels}, "spec": spec}},
            }
            for index, pod_labels in enumerate(labels)
        ),
        *(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": f"pod-{index}", "labels": pod_labels},
                "spec": spec,
            }
            for index, pod_labels in enumerate(labels)
        ),
    )

    async def read(url: str) -> tuple[list[str], list[str]]:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            cluster = kubernetes.Cluster(client, namespace.name)
            jobs, pods = await cluster.list_jobs(pool, timedelta()), await cluster.list_pods(pool, timedelta())
            assert {pod.container for pod in pods} == {name}
        return [job.run for job in jobs], [pod.run for pod in pods]

    with proxied(namespace.context) as url:
        jobs, pods = asyncio.run(read(url))
    runs = sorted(pod_labels[RUN_LABEL] for pod_labels in labels)
    assert sorted(jobs) == sorted(pods) == runs
