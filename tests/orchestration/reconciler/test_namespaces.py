"""A reconciler of several namespaces, on a Kubernetes API server without nodes and a real Prefect server."""

import asyncio
import ssl
from pathlib import Path
from uuid import uuid4

import httpx

from orchestration.health import Pulse
from orchestration.prefect_api import Server
from orchestration.protocol import CLUSTER_LABEL, POOL_LABEL, RUN_LABEL
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.reconciler.leader_election import LeaderElection
from orchestration.reconciler.loop import Reconciler
from orchestration.reconciler.model import Policy
from tests.cluster import apiserver
from tests.helm.rendering import Object
from tests.parts import asked, client_of

NEW, FORMER = reversed(apiserver.NAMESPACES)


def _orphan(namespace: str, pool: str) -> Object:
    """Return a Job of a run that was deleted."""
    labels = {RUN_LABEL: str(uuid4()), POOL_LABEL: pool}
    pod = {"restartPolicy": "Never", "containers": [{"name": "prefect-job", "image": "none"}]}
    metadata = {"name": "orphan", "namespace": namespace, "labels": labels}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": {"spec": pod}}}


def test_round_handles_runs_in_each_namespace_and_in_no_other(prefect_server: str, tmp_path: Path) -> None:
    name = f"namespaces-{uuid4().hex[:6]}"
    with apiserver.alone(tmp_path) as kubernetes, client_of(prefect_server) as api:
        pki = tmp_path / "pki"
        context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        pool = asked(api, "POST", "/work_pools/", {"name": name, "type": "kubernetes"})["id"]
        flow = asked(api, "POST", "/flows/", {"name": name})["id"]
        deployment = asked(api, "POST", "/deployments/", {"name": "d", "flow_id": flow, "work_pool_name": name})["id"]

        async def run_round(*runs: str) -> None:
            async with (
                httpx.AsyncClient(base_url=prefect_server, timeout=75) as for_prefect,
                httpx.AsyncClient(base_url=kubernetes.client.base_url, verify=context, timeout=30) as for_kubernetes,
            ):
                clusters = [Cluster(for_kubernetes, place) for place in (NEW, FORMER)]
                identity = await clusters[0].identity()
                for run in runs:
                    asked(api, "PATCH", f"/flow_runs/{run}/labels", {CLUSTER_LABEL: identity})
                server = Server(for_prefect, prefect_server)
                # On a busy machine a round may outlast the usual Lease of 15 s.
                lead = LeaderElection(clusters[0].in_namespace("default"), "lease", "this one", duration=600)
                assert await lead.acquire_or_renew()
                policy = Policy(settle_seconds=0)
                await Reconciler(server, clusters, name, policy, lead, Pulse(60)).round()
                # The Lease is in neither of the namespaces.
                assert await clusters[0].ask("GET", "/apis/coordination.k8s.io/v1/namespaces/default/leases/lease")

        runs = {}
        for namespace in (NEW, FORMER, "kube-public"):
            kubernetes.create(_orphan(namespace, pool))
            body = {"state": {"type": "RUNNING"}}
            runs[namespace] = asked(api, "POST", f"/deployments/{deployment}/create_flow_run", body)["id"]
            asked(api, "PATCH", f"/flow_runs/{runs[namespace]}", {"infrastructure_pid": f"{namespace}:gone"})
        asyncio.run(run_round(*runs.values()))

        states = {place: asked(api, "GET", f"/flow_runs/{run}")["state_type"] for place, run in runs.items()}
        assert states == {NEW: "CRASHED", FORMER: "CRASHED", "kube-public": "RUNNING"}
        jobs = kubernetes.client.get("/apis/batch/v1/jobs").raise_for_status().json()["items"]
        left = {job["metadata"]["namespace"] for job in jobs if not job["metadata"].get("deletionTimestamp")}
        assert left == {"kube-public"}
