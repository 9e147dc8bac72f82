"""Warm pods, on a real Kubernetes API server without nodes: which are kept, and which run takes which.

A cancelled run ends its own Job there.
"""

import asyncio
import contextlib
import copy
import hashlib
import logging
import ssl
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import UUID, uuid4

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import State
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)
from prefect.states import Cancelling, Completed, Pending, Scheduled

from orchestration.errors import ClusterError
from orchestration.prefect_compat.workers import CompatibleWorker
from orchestration.protocol import (
    CLAIM_ANNOTATION,
    CREDENTIAL_ANNOTATION,
    FORMER_SIGNING_KEYS_VARIABLE,
    HAND_OVER_ANNOTATION,
    POOL_LABEL,
    RUN_LABEL,
    SIGNING_KEY_VARIABLE,
    WARM_LABEL,
)
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.runs import hand_over
from orchestration.worker import kubernetes_worker, warm_pods
from orchestration.worker.warm_pods import WarmJob, WarmPods, explain_unfit, shape_of, warm_manifest
from tests.cluster import apiserver
from tests.helm.rendering import render
from tests.helm.test_prefect_work_pool import pool_of
from tests.parts import wait_until


@flow
def nothing() -> None:
    """Do nothing: no run of this flow is executed."""


pytestmark = pytest.mark.usefixtures("closed_worker_channels")

VALUES = {"image": {"tag": "1"}, "runs": {"warm": {"replicas": 1}}}

POOL = "5f0c0000-0000-7000-8000-000000000001"
CLAIM, OTHER_CLAIM = (UUID(f"0199c0de-0000-7000-8000-0000000000a{number}") for number in (1, 2))

JOBS = f"/apis/batch/v1/namespaces/{apiserver.NAMESPACE}/jobs"
PODS = f"/api/v1/namespaces/{apiserver.NAMESPACE}/pods"


def run_manifest(run: str, **container: Any) -> dict[str, Any]:
    """Return the Job that a run would get."""
    env = [
        {"name": "PREFECT_API_URL", "value": "http://api"},
        {"name": "PREFECT__FLOW_RUN_ID", "value": run},
        {"name": "PREFECT_API_AUTH_STRING", "value": f"run-{run}:secret"},
        {"name": "DATABASE", "valueFrom": {"secretKeyRef": {"name": "database", "key": "url"}}},
    ]
    labels = {POOL_LABEL: POOL, RUN_LABEL: run, "prefect.io/flow-run-name": f"heron-{run}"}
    main = {
        "name": "prefect-job",
        "image": "image",
        "env": env,
        "command": ["python", "/app/orchestration/execution.py"],
        "args": ["prefect", "flow-run", "execute"],
    } | container
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"heron-{run}", "labels": labels, "annotations": {}},
        "spec": {
            "backoffLimit": 0,
            "template": {
                "metadata": {"labels": {**labels, "team": "data"}, "annotations": {"of": "the template"}},
                "spec": {"restartPolicy": "Never", "containers": [main]},
            },
        },
    }


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[apiserver.ApiServer, Path]]:
    """Yield a Kubernetes API server and the folder with its certificates."""
    folder = tmp_path_factory.mktemp("apiserver")
    with apiserver.alone(folder) as found:
        yield found, folder


@contextlib.asynccontextmanager
async def connected(api: tuple[apiserver.ApiServer, Path]) -> AsyncIterator[Cluster]:
    server, folder = api
    context = ssl.create_default_context(cafile=str(folder / "pki/ca.crt"))
    context.load_cert_chain(folder / "pki/admin.crt", folder / "pki/admin.key")
    async with httpx.AsyncClient(base_url=server.client.base_url, verify=context, timeout=30) as client:
        yield Cluster(client, apiserver.NAMESPACE)


class Node:
    """Makes the pods of warm Jobs, as Kubernetes would."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def create(self, warm: WarmPods, number: int, shape: str, *, ready: bool = True) -> list[str]:
        """Create Jobs of warm pods with their pods; return their names."""
        return [
            await self.start(warm.annotate(warm_manifest(run_manifest("sample"), 60), shape), ready=ready)
            for _ in range(number)
        ]

    async def start(self, manifest: dict[str, Any], *, ready: bool = True) -> str:
        """Create a Job with its pod; return their name."""
        made = await self._cluster.ask("POST", JOBS, manifest)
        name = str(made["metadata"]["name"])
        labels = made["spec"]["template"]["metadata"]["labels"] | {"job-name": name}
        pod = {"metadata": {"name": name, "labels": labels}, "spec": made["spec"]["template"]["spec"]}
        await self._cluster.ask("POST", PODS, pod)
        condition = {"type": "Ready" if ready else "PodScheduled", "status": str(ready)}
        status = {"status": {"phase": "Running" if ready else "Pending", "conditions": [condition]}}
        await self._cluster.ask("PATCH", f"{PODS}/{name}/status", status)
        return name

    async def handed_over(self, name: str) -> dict[str, str]:
        """Return the environment variables that a warm pod has got."""
        pod = await self._cluster.ask("GET", f"{PODS}/{name}")
        text = pod["metadata"]["annotations"][HAND_OVER_ANNOTATION]
        return hand_over.decrypt(text, warm_pods._hand_over_key(pod))

    async def names(self) -> set[str]:
        """Return the Jobs that wait for a run."""
        found = await self._cluster.ask("GET", JOBS, query={"labelSelector": f"{WARM_LABEL}=waiting"})
        return {job["metadata"]["name"] for job in found["items"]}

    async def clear(self) -> None:
        for path in (JOBS, PODS):
            await self._cluster.ask("DELETE", path, {"gracePeriodSeconds": 0, "propagationPolicy": "Background"})


def warm(replicas: int, cluster: Cluster, age: float = 600) -> WarmPods:
    found = WarmPods(replicas, age, logging.getLogger("test"))
    found.connect(cluster)
    return found


def test_shape_ignores_the_run_and_nothing_else() -> None:
    first, second = run_manifest("1"), run_manifest("2")
    shape = shape_of(first)
    assert shape_of(second) == shape
    second["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"] = "of the deployment"
    second["spec"]["template"]["spec"]["containers"][0]["env"].append({"name": "PREFECT__FLOW_NAME", "value": "a"})
    for name in (SIGNING_KEY_VARIABLE, FORMER_SIGNING_KEYS_VARIABLE):
        second["spec"]["template"]["spec"]["containers"][0]["env"].append({"name": name, "value": "a"})
    assert shape_of(second) == shape
    changes: list[Any] = [
        lambda spec: spec.update(activeDeadlineSeconds=60),
        lambda spec: spec["template"]["metadata"]["labels"].update({"sidecar.istio.io/inject": "false"}),
        lambda spec: spec["template"]["metadata"]["annotations"].update(of="a job variable"),
        lambda spec: spec["template"]["spec"]["containers"][0].update(image="another"),
        lambda spec: spec["template"]["spec"]["containers"][0].update(resources={"limits": {"memory": "2Gi"}}),
        lambda spec: spec["template"]["spec"]["containers"][0]["env"].append({"name": "MODE", "value": "fast"}),
        lambda spec: spec["template"]["spec"]["containers"][0]["env"].pop(3),
    ]
    for change in changes:
        changed = copy.deepcopy(first)
        change(changed["spec"])
        assert shape_of(changed) != shape


def test_credential_by_reference_is_that_of_all_runs() -> None:
    """Runs share it where the server has no API roles. The warm pod has it from its start."""
    manifest = run_manifest("1")
    manifest["spec"]["template"]["spec"]["containers"][0]["env"][2] = entry = {
        "name": "PREFECT_API_AUTH_STRING",
        "valueFrom": {"secretKeyRef": {"name": "auth", "key": "auth-string"}},
    }
    assert shape_of(manifest) != shape_of(run_manifest("1"))
    assert entry in warm_manifest(manifest, 60)["spec"]["template"]["spec"]["containers"][0]["env"]


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("spec", {"backoffLimit": 3}, "backoffLimit is 3, so that"),
        ("spec", {"activeDeadlineSeconds": 60}, "activeDeadlineSeconds is 60, so that"),
        ("spec", {"podFailurePolicy": {"rules": [{"action": "Ignore"}]}}, "an action of podFailurePolicy is Ignore"),
        ("spec", {"podFailurePolicy": {"rules": [{"action": "FailJob"}]}}, ""),
        ("pod", {"activeDeadlineSeconds": 60}, "activeDeadlineSeconds is 60, so that"),
        ("main", {"args": ["sleep", "1"]}, "args is ['sleep', '1'], so that"),
        ("main", {"command": ["tini", "--"]}, "command is ['tini', '--'], so that"),
        ("main", {"command": None}, "command is None, so that"),
        ("env", {"name": "A", "value": "x $(PREFECT__FLOW_RUN_ID)"}, "a value is $(PREFECT__FLOW_RUN_ID), so that"),
        ("env", {"name": "A", "value": "$(PREFECT_API_AUTH_STRING)"}, "a value is $(PREFECT_API_AUTH_STRING), so"),
        ("env", {"name": "A", "value": "$(RESULTS_SIGNING_KEY)"}, "a value is $(RESULTS_SIGNING_KEY), so that"),
        ("env", {"name": "A", "value": "$(DATABASE)"}, ""),
        (
            "env",
            {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{RUN_LABEL}']"}}},
            f"A is metadata.labels['{RUN_LABEL}'], so that",
        ),
        (
            "init",
            {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{RUN_LABEL}']"}}},
            f"A is metadata.labels['{RUN_LABEL}'], so that",
        ),
        (
            "env",
            {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app.kubernetes.io/instance']"}}},
            "",
        ),
        ("env", {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['job-name']"}}}, ""),
    ],
)
def test_template_whose_runs_cannot_be_in_warm_pods_is_explained(
    place: str, change: dict[str, Any], message: str
) -> None:
    manifest = run_manifest("1")
    assert explain_unfit(manifest) == ""
    spec, pod = manifest["spec"], manifest["spec"]["template"]["spec"]
    if place == "env":
        pod["containers"][0]["env"].append(change)
    elif place == "init":
        pod["initContainers"] = [{"name": "init", "env": [change]}]
    else:
        {"spec": spec, "pod": pod, "main": pod["containers"][0]}[place].update(change)
    found = explain_unfit(manifest)
    assert found.startswith(message)
    assert (": set it to " in found) == bool(message)


def test_template_with_a_sidecar_has_no_warm_pods() -> None:
    manifest = run_manifest("1")
    manifest["spec"]["template"]["spec"]["containers"].append({"name": "proxy"})
    assert explain_unfit(manifest).startswith("the number of containers is 2, so that")


@pytest.mark.parametrize(
    ("condition", "has_ended", "has_failed"),
    [("Suspended", False, False), ("Complete", True, False), ("FailureTarget", True, False), ("Failed", True, True)],
)
def test_suspended_job_has_not_ended(condition: str, has_ended: bool, has_failed: bool) -> None:
    """A queue suspends Jobs. Each that counted as ended would be followed by another."""
    meta = {"name": "warm-1", "resourceVersion": "1", "creationTimestamp": "2026-11-30T00:00:00Z"}
    found = WarmJob.read({"metadata": meta, "status": {"conditions": [{"type": condition, "status": "True"}]}})
    assert (found.has_ended, found.has_failed) == (has_ended, has_failed)


def test_pod_whose_key_is_a_reference_has_no_key() -> None:
    env = [{"name": "RUN_HAND_OVER_KEY", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]
    assert warm_pods._hand_over_key({"spec": {"containers": [{"env": env}]}}) == ""


def test_warm_pod_has_neither_run_nor_credential() -> None:
    text = str(warm_manifest(run_manifest("1"), 60))
    assert "secret" not in text.replace("secretKeyRef", "")
    assert "heron" not in text
    assert RUN_LABEL not in text
    assert text != str(warm_manifest(run_manifest("1"), 60)), "each pod has another key"


def test_each_of_two_runs_takes_a_warm_pod(api: tuple[apiserver.ApiServer, Path]) -> None:
    """Two workers ask at the same time, for more runs than there are pods."""

    async def take() -> None:
        async with connected(api) as cluster:
            node, (one, other) = Node(cluster), (warm(2, cluster), warm(2, cluster))
            shape = shape_of(run_manifest("x"))
            assert await one.take(run_manifest("x"), CLAIM) == ""
            assert await one.keep(POOL, shape, is_room_needed=False) == 2
            made = await node.create(one, 2, shape)
            runs = [str(uuid4()) for _ in range(4)]
            claims = [uuid4() for _ in runs]
            taken = await asyncio.gather(
                *([one, other][number % 2].take(run_manifest(run), claims[number]) for number, run in enumerate(runs))
            )
            assert sorted(name for name in taken if name) == sorted(made)
            assert await node.names() == set()
            for number, name in enumerate(taken):
                if not name:
                    continue
                job, pod = [await cluster.ask("GET", f"{path}/{name}") for path in (JOBS, PODS)]
                assert job["metadata"]["labels"][RUN_LABEL] == pod["metadata"]["labels"][RUN_LABEL] == runs[number]
                assert job["metadata"]["annotations"][CLAIM_ANNOTATION].startswith(f"{claims[number]} ")
                assert pod["metadata"]["annotations"]["of"] == "the template"
                credential = f"run-{runs[number]}:secret"
                hashed = hashlib.sha256(credential.encode()).hexdigest()
                assert job["metadata"]["annotations"][CREDENTIAL_ANNOTATION] == hashed
                assert await node.handed_over(name) == {
                    "PREFECT__FLOW_RUN_ID": runs[number],
                    "PREFECT_API_AUTH_STRING": credential,
                    "RUN_CLAIM": str(claims[number])[-12:],
                }
            await node.clear()

    asyncio.run(asyncio.wait_for(take(), 120))


@pytest.mark.further
def test_run_without_a_fitting_ready_pod_takes_none(api: tuple[apiserver.ApiServer, Path]) -> None:
    async def take() -> None:
        async with connected(api) as cluster:
            node, kept = Node(cluster), warm(2, cluster)
            shape = shape_of(run_manifest("x"))
            await kept.keep(POOL, shape, is_room_needed=False)
            await node.create(kept, 1, shape, ready=False)
            assert await kept.take(run_manifest("1"), CLAIM) == "", "its node does not answer"
            [name] = await node.create(kept, 1, shape)
            assert await kept.take(run_manifest("1", image="another"), CLAIM) == ""
            assert await warm(2, cluster, age=0).take(run_manifest("1"), CLAIM) == "", "its Secrets are too old"
            assert await kept.take(run_manifest("1"), CLAIM) == name
            await node.clear()

    asyncio.run(asyncio.wait_for(take(), 120))


def test_claim_whose_first_request_was_not_answered_takes_one_pod(
    api: tuple[apiserver.ApiServer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each first request has an effect and no answer. When the second is answered, the pod has executed the run."""
    monkeypatch.setattr(warm_pods, "RETRY_SECONDS", 0.01)

    async def take() -> None:
        async with connected(api) as cluster:
            node, kept = Node(cluster), warm(2, cluster)
            shape = shape_of(run_manifest("x"))
            await kept.keep(POOL, shape, is_room_needed=False)
            made = await node.create(kept, 2, shape)
            ask, unanswered = cluster.ask, set[str]()

            async def ask_twice(method: str, path: str, *arguments: Any, **options: Any) -> Any:
                answer = await ask(method, path, *arguments, **options)
                if method == "PATCH" and path not in unanswered:
                    unanswered.add(path)
                    if path.startswith(PODS):
                        await ask("PATCH", f"{path}/status", {"status": {"phase": "Succeeded"}})
                    raise ClusterError("The Kubernetes API does not answer")
                return answer

            with patch.object(cluster, "ask", ask_twice):
                taken = await kept.take(run_manifest("1"), CLAIM)
            assert taken in made
            assert len(unanswered) == 2
            assert await node.names() == set(made) - {taken}
            pod = await cluster.ask("GET", f"{PODS}/{taken}")
            assert HAND_OVER_ANNOTATION in pod["metadata"]["annotations"]
            await node.clear()

    asyncio.run(asyncio.wait_for(take(), 120))


@pytest.mark.further
def test_job_whose_status_changes_meanwhile_is_taken(api: tuple[apiserver.ApiServer, Path]) -> None:
    """Kubernetes writes the number of ready pods into the Job about when the worker labels it."""

    async def take() -> None:
        async with connected(api) as cluster:
            node, kept = Node(cluster), warm(1, cluster)
            shape = shape_of(run_manifest("x"))
            await kept.keep(POOL, shape, is_room_needed=False)
            [name] = await node.create(kept, 1, shape)
            find = kept._find_candidates

            async def find_earlier(manifest: Any) -> Any:
                found = await find(manifest)
                await cluster.ask("PATCH", f"{JOBS}/{name}/status", {"status": {"active": 1, "ready": 1}})
                return found

            with patch.object(kept, "_find_candidates", find_earlier):
                assert await kept.take(run_manifest("1"), CLAIM) == name
                assert await kept.take(run_manifest("2"), OTHER_CLAIM) == ""
            await node.clear()

    asyncio.run(asyncio.wait_for(take(), 120))


@pytest.mark.parametrize("is_gone", [pytest.param(True, marks=pytest.mark.further), False])
def test_job_whose_pod_has_ended_is_deleted_and_the_run_gets_its_own(
    api: tuple[apiserver.ApiServer, Path], is_gone: bool
) -> None:
    async def take() -> None:
        async with connected(api) as cluster:
            node, kept = Node(cluster), warm(2, cluster)
            shape = shape_of(run_manifest("x"))
            await kept.keep(POOL, shape, is_room_needed=False)
            [name] = await node.create(kept, 1, shape)
            find = kept._find_candidates

            async def find_too_late(manifest: Any) -> Any:
                found = await find(manifest)
                if is_gone:
                    await cluster.ask("DELETE", f"{PODS}/{name}", {"gracePeriodSeconds": 0})
                else:
                    await cluster.ask("PATCH", f"{PODS}/{name}/status", {"status": {"phase": "Failed"}})
                return found

            with patch.object(kept, "_find_candidates", find_too_late):
                assert await kept.take(run_manifest("1"), CLAIM) == ""
            assert await cluster.ask("GET", f"{JOBS}/{name}", absent=(404,)) is None
            await node.clear()

    asyncio.run(asyncio.wait_for(take(), 120))


def test_number_of_warm_pods_is_kept(api: tuple[apiserver.ApiServer, Path]) -> None:
    async def keep() -> None:
        async with connected(api) as cluster:
            node, shape = Node(cluster), "shape"
            earlier = warm(2, cluster)
            assert await earlier.keep(POOL, shape, is_room_needed=False) == 2
            old = await node.create(earlier, 3, shape)
            assert await earlier.keep(POOL, shape, is_room_needed=False) == 0
            assert len(await node.names()) == 2, "one was too many"
            assert await earlier.keep(POOL, "another template", is_room_needed=False) == 2
            assert await node.names() == set()
            await node.create(earlier, 2, shape)
            later = warm(2, cluster)
            assert await later.keep(POOL, shape, is_room_needed=False) == 2
            assert await node.names() == set(), "the pods of a worker that started before have the image of then"
            new = await node.create(later, 2, shape)
            assert await earlier.keep(POOL, shape, is_room_needed=False) == 0
            assert await node.names() == set(new), "the worker that started last keeps them"
            assert not set(new) & set(old)
            forged = run_manifest("forger")
            forged["metadata"]["labels"][WARM_LABEL] = "waiting"
            await cluster.ask("POST", JOBS, forged)
            assert await later.keep(POOL, shape, is_room_needed=True) == 0
            assert await node.names() == {"heron-forger"}, "they give way to a run, and no other Job does"
            await cluster.ask("DELETE", f"{JOBS}/heron-forger", {"propagationPolicy": "Background"})
            assert await earlier.keep(POOL, shape, is_room_needed=False) == 0, "the newer worker would delete them"
            assert earlier._superseded_until < earlier._now + timedelta(minutes=2), "the newer worker may be gone"
            assert await later.keep(POOL, shape, is_room_needed=False) == 0, "a pod that has just given way stays away"
            full = warm(2, cluster)
            await full.keep(POOL, shape, is_room_needed=False)
            await node.create(full, 1, shape, ready=False)
            assert await full.keep(POOL, shape, is_room_needed=False) == 0
            assert await node.names() == set(), "no warm pod waits for room"
            aged = warm(1, cluster, age=0)
            await aged.keep(POOL, shape, is_room_needed=False)
            await node.create(aged, 1, shape)
            assert await aged.keep(POOL, shape, is_room_needed=False) == 1
            await node.clear()

    asyncio.run(asyncio.wait_for(keep(), 120))


@pytest.mark.further
def test_pod_that_a_run_takes_meanwhile_is_not_deleted(api: tuple[apiserver.ApiServer, Path]) -> None:
    async def keep() -> None:
        async with connected(api) as cluster:
            node, kept = Node(cluster), warm(1, cluster)
            shape = shape_of(run_manifest("x"))
            await kept.keep(POOL, shape, is_room_needed=False)
            [name] = await node.create(kept, 1, shape)
            listed = await kept._list("jobs", POOL)
            assert await kept.take(run_manifest("1"), CLAIM) == name
            await kept._delete(name, listed[0]["metadata"]["resourceVersion"])
            assert await cluster.ask("GET", f"{JOBS}/{name}")
            await node.clear()

    asyncio.run(asyncio.wait_for(keep(), 120))


KEPT_LABELS = (
    "app.kubernetes.io/instance", "app.kubernetes.io/component", "prefect.io/role", "job-name", "controller-uid",
    "batch.kubernetes.io/job-name", "batch.kubernetes.io/controller-uid",
)  # fmt: skip
"""The labels by which network policies and controllers know pods and Jobs."""


def test_workers_token_changes_labels_of_warm_pods_alone(api: tuple[apiserver.ApiServer, Path]) -> None:
    """With the permission to patch pods, the token could otherwise give any pod of the namespace another image."""
    server, _ = api
    objects = render("prefect-work-pool", VALUES)
    policies = [found for found in objects if found["metadata"]["name"].endswith("-worker-pods")]
    assert len(policies) == 2
    for policy in policies:
        server.create(policy)
    worker = f"system:serviceaccount:{apiserver.NAMESPACE}:test-prefect-work-pool-worker"
    headers = {
        "Impersonate-User": worker,
        "Impersonate-Group": "system:masters",
        "Content-Type": "application/strategic-merge-patch+json",
    }

    def is_allowed(path: str, body: dict[str, Any]) -> bool:
        answer = server.client.patch(path, json=body, headers=headers, params={"dryRun": "All"})
        assert answer.is_success or "If there is none, the token is stolen" in answer.text, answer.text
        return bool(answer.is_success)

    async def ask() -> None:
        async with connected(api) as cluster:
            node, kept = Node(cluster), warm(1, cluster)
            await kept.keep(POOL, "shape", is_room_needed=False)
            [name] = await node.create(kept, 1, "shape")
            other = {"name": "other", "labels": {"app": "database"}}
            spec = {"restartPolicy": "Never", "containers": [{"name": "prefect-job", "image": "image"}]}
            await cluster.ask("POST", PODS, {"metadata": other, "spec": spec})
            labels = {"metadata": {"labels": {RUN_LABEL: "1"}, "annotations": {HAND_OVER_ANNOTATION: "text"}}}
            image = {"spec": {"containers": [{"name": "prefect-job", "image": "hostile"}]}}
            warming = {"metadata": {"labels": {WARM_LABEL: "waiting"}}}
            wait_until(lambda: not is_allowed(f"{PODS}/other", labels), "the policies to be in force")
            assert is_allowed(f"{PODS}/{name}", labels)
            assert not is_allowed(f"{PODS}/{name}", image)
            for path in (f"{PODS}/{name}", f"{JOBS}/{name}"):
                for label in KEPT_LABELS:
                    assert not is_allowed(path, {"metadata": {"labels": {label: "another"}}}), label
                assert not is_allowed(path, {"metadata": {"finalizers": ["example.com/never"]}})
            assert not is_allowed(f"{PODS}/other", image)
            assert not is_allowed(f"{PODS}/other", warming)
            assert not is_allowed(f"{JOBS}/{name}", {"spec": {"activeDeadlineSeconds": 9}})
            await node.clear()

    try:
        asyncio.run(asyncio.wait_for(ask(), 120))
    finally:
        for policy in policies:
            server.delete(policy)


@pytest.mark.further
def test_credential_that_cold_runs_have_by_reference_is_not_handed_over(
    prefect_server: str, api: tuple[apiserver.ApiServer, Path]
) -> None:
    server, folder = api

    async def complete() -> dict[str, Any]:
        pool = f"warm-{uuid4().hex[:6]}"
        template = pool_of(render("prefect-work-pool", VALUES))["base_job_template"]
        async with get_client() as client:
            await client.create_work_pool(WorkPoolCreate(name=pool, type="kubernetes", base_job_template=template))
            async with kubernetes_worker.Worker(work_pool_name=pool, create_pool_if_not_found=False) as tested:
                await tested.sync_with_backend()
                return dict((await tested._read_warm_configuration()).job_manifest)

    prefix = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
    environment = {f"{prefix}_NAME": "auth", f"{prefix}_KEY": "auth-string"}
    environment["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED"] = "false"
    location = "kubernetes_asyncio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    with (
        patch(location, str(server.kubeconfig(folder))),
        patch.dict("os.environ", environment),
        temporary_settings({PREFECT_API_URL: prefect_server, PREFECT_API_AUTH_STRING: "admin:password"}),
    ):
        manifest = asyncio.run(asyncio.wait_for(complete(), 600))
    assert "PREFECT_API_AUTH_STRING" not in warm_pods._variables_of_run(manifest)
    entry = {"name": "PREFECT_API_AUTH_STRING", "valueFrom": {"secretKeyRef": {"name": "auth", "key": "auth-string"}}}
    assert entry in warm_manifest(manifest, 60)["spec"]["template"]["spec"]["containers"][0]["env"]
    assert "admin:password" not in str(manifest)


def test_worker_creates_the_pods_that_its_runs_fit(
    prefect_server: str, api: tuple[apiserver.ApiServer, Path], tmp_path: Path
) -> None:
    """The sample of which the worker makes warm pods has the shape of real runs, whose credentials differ."""
    server, folder = api
    (tmp_path / "run-key").write_text("k" * 32)
    created: list[dict[str, Any]] = []

    async def create(_: Any, configuration: Any, __: Any) -> None:
        created.append(configuration.job_manifest)

    async def keep() -> None:
        pool = f"warm-{uuid4().hex[:6]}"
        template = pool_of(render("prefect-work-pool", VALUES))["base_job_template"]
        async with get_client() as client, connected(api) as cluster:
            await client.create_work_pool(WorkPoolCreate(name=pool, type="kubernetes", base_job_template=template))
            async with kubernetes_worker.Worker(
                work_pool_name=pool,
                create_pool_if_not_found=False,
                namespace=apiserver.NAMESPACE,
                signing_keys=(b"k" * 32, b"f" * 32),
                warm_replicas=2,
            ) as tested:
                await tested.sync_with_backend()
                assert tested._warm
                tested._warm.connect(cluster)
                await tested._replace_warm_pods(tested._warm)
                run = await client.create_flow_run(nothing)
                configuration = await tested.job_configuration.resolve_for_flow_run(
                    run, client=client, work_pool=tested.work_pool, worker_name=tested.name
                )
                tested._complete_manifest(run.id, configuration)
                shapes = {job["metadata"]["annotations"][warm_pods.SHAPE_ANNOTATION] for job in created}
                assert len(created) == 2
                assert shapes == {shape_of(configuration.job_manifest)}
                assert "k" * 32 not in str(created)
                assert f"run-{run.id}" not in str(created)
                assert "PREFECT_API_AUTH_STRING" not in str(created)
                node = Node(cluster)
                name = await node.start(created[0])
                assert await tested._warm.take(configuration.job_manifest, CLAIM) == name
                handed = await node.handed_over(name)
                assert handed["PREFECT_API_AUTH_STRING"].startswith(f"run-{run.id}:")
                assert handed[SIGNING_KEY_VARIABLE]
                assert handed[FORMER_SIGNING_KEYS_VARIABLE]
                states: list[State[Any]] = [Completed(name="Unschedulable"), Pending(name="Unschedulable")]
                for number, state in enumerate(states):
                    await client.create_flow_run(nothing, state=state, work_pool_name=pool)
                    assert await tested.count_runs(kubernetes_worker.STATES_WITHOUT_ROOM) == number
                await node.clear()

    environment = {"RUN_CREDENTIALS": str(tmp_path), "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED": "false"}
    location = "kubernetes_asyncio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    with (
        patch(location, str(server.kubeconfig(folder))),
        patch.dict("os.environ", environment),
        patch.object(CompatibleWorker, "create_job", create),
        temporary_settings({PREFECT_API_URL: prefect_server}),
    ):
        asyncio.run(asyncio.wait_for(keep(), 120))


def _job(name: str, run: UUID) -> dict[str, Any]:
    container = {"name": "prefect-job", "image": "image"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": {RUN_LABEL: str(run)}},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }


def test_cancelled_run_ends_its_own_job_alone(prefect_server: str, api: tuple[apiserver.ApiServer, Path]) -> None:
    """A run names the Job of another run as its infrastructure, with a label of that run among its variables."""
    server, folder = api

    async def cancel() -> None:
        pool = f"cancelled-{uuid4().hex[:6]}"
        async with get_client() as client:
            await client.create_work_pool(WorkPoolCreate(name=pool, type="kubernetes"))
            made = await client.create_deployment(
                flow_id=await client.create_flow(nothing), name="nothing", work_pool_name=pool
            )
            victim = (await client.create_flow_run_from_deployment(made, state=Scheduled())).id
            labels = {"labels": {RUN_LABEL: str(victim)}}
            server.create(_job("victim", victim))
            async with kubernetes_worker.Worker(work_pool_name=pool, create_pool_if_not_found=False) as tested:
                await tested.sync_with_backend()
                for job in ("victim", "absent", "own"):
                    created = await client.create_flow_run_from_deployment(
                        made, state=Scheduled(), job_variables=labels
                    )
                    hostile = created.id
                    if job == "own":
                        server.create(_job("own", hostile))
                    await client.update_flow_run(hostile, infrastructure_pid=f"{apiserver.NAMESPACE}:{job}")
                    await client.set_flow_run_state(hostile, Cancelling(), force=True)
                    await tested._cancel_run(hostile)
                    state = (await client.read_flow_run(hostile)).state
                    assert state
                    assert state.message == "Flow run cancelled by worker while pending.", job
            listed = {job["metadata"]["name"]: job["metadata"] for job in server.client.get(JOBS).json()["items"]}
            assert "deletionTimestamp" not in listed["victim"]
            assert "own" not in listed or "deletionTimestamp" in listed["own"]

    location = "kubernetes_asyncio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    with (
        patch(location, str(server.kubeconfig(folder))),
        patch.dict("os.environ", PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED="false"),
        temporary_settings({PREFECT_API_URL: prefect_server, PREFECT_LOGGING_TO_API_ENABLED: False}),
    ):
        asyncio.run(asyncio.wait_for(cancel(), 600))
